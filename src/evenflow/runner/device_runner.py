"""The runner of a GPU: owns the model, the paged cache and what is known of the running requests there.

`launch` puts a step into the device's queue and returns; `collect` waits for its tokens, all that comes back.
A step of up to MAX_GRAPH_TOKENS tokens is padded to one of a few sizes and replayed as one graph.
"""

from dataclasses import dataclass, field
from math import isnan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenflow.config import Settings
from evenflow.distributed import TensorParallel, connect_peers, local_view
from evenflow.kernels.attention_plan import AttentionPlan, DeviceRows, make_plan, plan_attention
from evenflow.kernels.self_check import CheckedShape
from evenflow.kernels.step_inputs import expand_rows
from evenflow.layers.attention import LayerBatch, fit_cache_scales
from evenflow.layers.loading import Placement
from evenflow.layers.rotary import cos_sin
from evenflow.model_config import ModelConfig
from evenflow.models import make_model
from evenflow.request import StepPlan, StepResult, TokenLogprobs, TokenMasks
from evenflow.runner.device_batch import DeviceSlots, HostBuffers, HostStep
from evenflow.runner.device_sampler import DeviceSampler, Sampled
from evenflow.runner.graphs import Graphs, Sizes, round_up
from evenflow.runner.kv_cache import MemoryPlan, check_room_for_weights, make_caches, plan_device_memory
from evenflow.runner.sampler import to_lists
from evenflow.runner.start_check import check_at_start
from evenflow.runner.stream import GpuStream, Stream
from evenflow.runner.weights import fill_dummy, load_weights

NOT_FINITE = "the model's logits are not finite"

Chunks = list[tuple[Tensor, Tensor, Tensor]]


@dataclass(slots=True)
class Pending:
    """A launched step. mark: when its tokens are in `buffers`. sampled, prompt_logprobs: by row, on the device."""

    step: HostStep
    buffers: HostBuffers
    mark: object = None
    sampled: Sampled | None = None
    prompt_logprobs: dict[int, Chunks] = field(default_factory=dict)


def _checked_shape(settings: Settings, model: ModelConfig, num_ranks: int) -> CheckedShape:
    """What the kernels of a rank are compiled for, whose view `model` is."""
    hidden, heads, kv_heads = model.hidden_size, *(n * model.head_dim for n in (model.num_heads, model.num_kv_heads))
    products = (
        ((heads + 2 * kv_heads, hidden, False), model.qkv_bias),
        ((hidden, heads, False), model.attention_out_bias),
        ((2 * model.intermediate_size, hidden, True), model.mlp_bias),
        ((hidden, model.intermediate_size, False), model.mlp_bias),
        ((-(-model.vocab_size // num_ranks), hidden, False), False),
    )
    return CheckedShape(
        dtype=settings.dtype,
        cache_dtype=settings.kv_cache_dtype,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_heads=model.num_heads,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        block_size=settings.block_size,
        windows=tuple(sorted({window or 0 for window in model.windows})),
        has_head_norm=model.model_type == "qwen3",
        products=tuple(shape for shape, has_bias in products if not has_bias),
    )


class DeviceRunner:
    """Turns StepPlans into StepResults, two in flight. `directory` is not read with load_format="dummy".

    Raises ValueError when the weights do not fit the configuration, or the cache would not hold one request, and
    KernelError, a RuntimeError, when a kernel does not compute on this device what its reference does.

    kernel_account: one line about that comparison; "" where no kernel runs.
    """

    def __init__(
        self,
        settings: Settings,
        model_config: ModelConfig,
        directory: Path,
        tp: TensorParallel | None = None,
        stream: Stream | None = None,
    ) -> None:
        self.stream = stream or GpuStream(torch.device(settings.device))
        self.device, self.settings = self.stream.device, settings
        self.max_in_flight = 2 if settings.enable_overlap else 1
        tp = tp or TensorParallel()
        self.local = local_view(model_config, tp)  # the heads that this rank has
        check_room_for_weights(settings, model_config, tp.size)
        self.kernel_account = check_at_start(_checked_shape(settings, self.local, tp.size), self.device)
        dtype = getattr(torch, settings.dtype)
        if settings.enable_custom_all_reduce and tp.size > 1:
            self.kernel_account += f"; {connect_peers(tp, model_config.hidden_size, dtype)}"
        place = Placement(self.device, dtype, tp)
        self.model = make_model(model_config, place)
        if settings.load_format == "dummy":
            fill_dummy(self.model, settings.seed, tp.rank)
        else:
            load_weights(self.model, directory, is_tied=model_config.tie_word_embeddings)
        fit_cache_scales(self.model, getattr(torch, settings.kv_cache_dtype))
        self.max_tokens = round_up(settings.max_num_batched_tokens, 16)
        self._token_ids = torch.zeros(self.max_tokens, dtype=torch.int64, device=self.device)
        self._positions = torch.zeros_like(self._token_ids)
        self._store_index = torch.full_like(self._token_ids, -1)
        self.graphs = Graphs(self.stream, settings.max_num_seqs, is_enabled=settings.enable_graphs)
        self._attention_plan: AttentionPlan = make_plan(
            settings.max_num_seqs,
            self.local.num_heads,
            self.local.num_kv_heads,
            model_config.head_dim,
            self.device,
        )
        self._set_up(settings.max_model_len, num_blocks=1)
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.memory: MemoryPlan = plan_device_memory(settings, self.local, weight_bytes, self._activation_bytes(), tp)
        self._set_up(self.memory.max_model_len, self.memory.num_blocks)
        self.sampler = DeviceSampler(settings.max_num_seqs, model_config.vocab_size, self.slots)
        self._prompts: dict[int, tuple[list[int], int]] = {}  # by slot, where prompt_logprobs are asked for

    def _set_up(self, max_model_len: int, num_blocks: int) -> None:
        """What depends on the sizes that the memory decides."""
        settings, model = self.settings, self.local
        self.kv_caches = make_caches(num_blocks, settings, model, self.device)
        cos, sin = cos_sin(model.rope, model.head_dim, max_model_len, self.device)
        self.cos, self.sin = cos[:, 0].contiguous(), sin[:, 0].contiguous()
        self.slots = DeviceSlots(
            settings.max_num_seqs,
            max_model_len,
            settings.block_size,
            model.vocab_size,
            self.stream,
            self.max_in_flight + 1,
        )

    @torch.inference_mode()
    def _activation_bytes(self) -> int:
        """What the largest step takes beside weights and cache: it is run, on rows that are all padding."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        num_rows = min(self.settings.max_num_seqs, self.max_tokens)
        hidden = self._forward(Sizes(self.max_tokens, num_rows, self.max_tokens))
        logits = self.model.logits(hidden[:num_rows]).float()
        del hidden, logits
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None) -> Pending:
        step, buffers = self.slots.write(plan)
        pending = Pending(step, buffers)
        self.stream.submit(lambda: self._run(plan, pending, masks))
        pending.mark = self.stream.mark()
        return pending

    def collect(self, pending: Pending) -> StepResult:
        self.stream.wait(pending.mark)
        step = pending.step
        token_ids = np.full(len(step.slots), -1, dtype=np.int64)
        sampled = pending.buffers.out.numpy()[: len(step.sampling_rows)]
        token_ids[step.sampling_rows] = sampled
        bad = set(step.sampling_rows[sampled < 0].tolist())
        prompt_logprobs = {row: to_lists(chunks) for row, chunks in pending.prompt_logprobs.items()}
        bad |= {row for row, found in prompt_logprobs.items() if any(isnan(entry.logprobs[0]) for entry in found)}
        logprobs = self._logprobs(pending, bad)
        return StepResult(token_ids.tolist(), logprobs, prompt_logprobs, dict.fromkeys(sorted(bad), NOT_FINITE))

    def close(self) -> None:
        """Destroy the graphs: a library of collectives does not end before those that it is in."""
        self.graphs.clear()

    @staticmethod
    def _logprobs(pending: Pending, bad: set[int]) -> dict[int, TokenLogprobs]:
        """By row of the plan, cut to what each asked for."""
        sampled, rows = pending.sampled, pending.step.sampling_rows
        if sampled is None or sampled.logprobs is None:
            return {}
        found = {}
        for (index, wanted), entry in zip(sampled.logprob_rows, to_lists([sampled.logprobs]), strict=True):
            if (row := int(rows[index])) not in bad:
                found[row] = TokenLogprobs(entry.token_ids[: 1 + wanted], entry.logprobs[: 1 + wanted], entry.rank)
        return found

    # In the device's queue

    @torch.inference_mode()
    def _run(self, plan: StepPlan, pending: Pending, masks: TokenMasks | None) -> None:
        step, buffers = pending.step, pending.buffers
        for request in plan.admitted:
            self.sampler.admit(request)
            self._prompts.pop(request.slot, None)
            if (wanted := request.params.prompt_logprobs) is not None and request.num_prompt_tokens > 1:
                self._prompts[request.slot] = (request.token_ids[: request.num_prompt_tokens], wanted)
        self.slots.send(step, buffers)
        if plan.zero_block_ids:
            blocks = torch.tensor(plan.zero_block_ids, device=self.device)
            for kv_cache in self.kv_caches:
                kv_cache.view(torch.uint8)[blocks] = 0
        prompt_ends = self._prompt_ends(step)
        is_sampling_only = step.max_query_len > 1 and not prompt_ends
        hidden = self.graphs.run(
            Sizes(step.num_tokens, len(step.slots), step.max_query_len, is_sampling_only), self._forward
        )
        self._find_prompt_logprobs(pending, hidden, prompt_ends)
        if count := len(step.sampling_rows):
            sampled = hidden[:count] if is_sampling_only else hidden[self.slots.rows.sample_tokens[:count]]
            self._sample(pending, sampled, masks)

    def _sample(self, pending: Pending, hidden: Tensor, masks: TokenMasks | None) -> None:
        step = pending.step
        rows = step.sampling_rows
        if masks is not None:
            masks = TokenMasks(np.searchsorted(rows, masks.rows).tolist(), masks.bits)  # of the rows that sample
        logits = self.model.logits(hidden)
        pending.sampled = self.sampler.draw(logits, step.slots[rows], step.ends[rows], masks)
        pending.buffers.out[: len(rows)].copy_(pending.sampled.token_ids, non_blocking=True)

    def _forward(self, sizes: Sizes) -> Tensor:
        """Hidden states [num_tokens or num_rows, hidden] of the step whose words are on the device, padded to `sizes`.

        Everything else about the step is read on the device, so that a recording of this serves any step that fits.
        """
        rows, slots = self.slots.rows, self.slots
        num_tokens, num_rows, max_query_len, is_sampling_only = sizes
        token_ids, positions = self._token_ids[:num_tokens], self._positions[:num_tokens]
        query_starts, row_slots = rows.query_starts[: num_rows + 1], rows.slots[:num_rows]
        store_index = self._store_index[:num_tokens]
        expand_rows(
            query_starts, rows.starts[:num_rows], row_slots, slots.token_ids, slots.block_tables, slots.block_size,
            token_ids, positions, store_index,
        )  # fmt: skip
        attention = DeviceRows(
            query_starts=query_starts,
            seq_lens=rows.seq_lens[:num_rows],
            slots=row_slots,
            block_tables=slots.block_tables,
            store_index=store_index,
            positions=positions,
            max_query_len=max_query_len,
            plan=self._attention_plan,
        )
        plan_attention(attention)
        wanted = rows.sample_tokens[:num_rows] if is_sampling_only else None
        return self.model(token_ids, LayerBatch(self.cos, self.sin, attention, wanted), self.kv_caches)

    def _prompt_ends(self, step: HostStep) -> dict[int, int]:
        """Of the rows that ask for log-probabilities of prompt tokens p + 1 in this step: where the positions p end."""
        if not self._prompts:
            return {}
        found = {}
        for row, (slot, start, end) in enumerate(zip(step.slots.tolist(), step.starts, step.ends, strict=True)):
            if slot in self._prompts and (last := len(self._prompts[slot][0]) - 1) > start:
                found[row] = min(int(end), last)
        return found

    def _find_prompt_logprobs(self, pending: Pending, hidden: Tensor, prompt_ends: dict[int, int]) -> None:
        """Of the rows that ask: for each prompt position p computed in this step, log-probabilities of token p + 1."""
        step = pending.step
        for row, end in prompt_ends.items():
            prompt, wanted = self._prompts[int(step.slots[row])]
            start, first = int(step.starts[row]), int(step.query_starts[row])
            targets = torch.tensor(prompt[start + 1 : end + 1])
            pending.prompt_logprobs[row] = self.sampler.prompt_logprob_tensors(
                self.model.logits, hidden[first : first + end - start], targets, wanted
            )
            if end == len(prompt) - 1:
                del self._prompts[int(step.slots[row])]
