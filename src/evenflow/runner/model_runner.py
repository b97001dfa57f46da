"""The runner of a CPU: owns the model, the paged cache and the slots' state; a step is computed when it is launched."""

from math import isnan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evenflow.config import Settings
from evenflow.distributed import TensorParallel, local_view
from evenflow.kernels.attention import make_workspace
from evenflow.layers.attention import LayerBatch
from evenflow.layers.loading import Placement
from evenflow.layers.rotary import cos_sin
from evenflow.model_config import ModelConfig
from evenflow.models import make_model
from evenflow.request import StepPlan, StepResult, TokenLogprobs, TokenMasks
from evenflow.runner.batch import Batch, SlotState
from evenflow.runner.kv_cache import MemoryPlan, check_room_for_weights, make_caches, plan_memory
from evenflow.runner.sampler import Sampler
from evenflow.runner.threads import is_small, one_thread_if
from evenflow.runner.weights import fill_dummy, load_weights

NOT_FINITE = "the model's logits are not finite"


class ModelRunner:
    """Turns a StepPlan into a StepResult. `directory` holds the checkpoint and is not read with load_format="dummy".

    tp: the group in which this runner is a rank; all ranks are made, and execute the same plans, at the same time.

    Raises ValueError when the weights do not fit the configuration, or the cache would not hold one request.
    """

    def __init__(
        self, settings: Settings, model_config: ModelConfig, directory: Path, tp: TensorParallel | None = None
    ) -> None:
        tp = tp or TensorParallel()
        self.device = torch.device(settings.device)
        self.local = local_view(model_config, tp)  # the heads that this rank has
        check_room_for_weights(settings, model_config, tp.size)
        self.model = make_model(model_config, Placement(self.device, getattr(torch, settings.dtype), tp))
        if settings.load_format == "dummy":
            fill_dummy(self.model, settings.seed, tp.rank)
        else:
            load_weights(self.model, directory, is_tied=model_config.tie_word_embeddings)
        weight_bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.num_parameters = self.local.num_parameters
        self.kv_bytes_per_token = settings.kv_bytes_per_token(self.local)
        self.memory: MemoryPlan = plan_memory(settings, self.local, weight_bytes, tp)
        self.kv_caches = make_caches(self.memory.num_blocks, settings, self.local, self.device)
        self.workspace = make_workspace(self.kv_caches[0])
        max_model_len = self.memory.max_model_len
        self.cos, self.sin = cos_sin(model_config.rope, model_config.head_dim, max_model_len, self.device)
        self.slots = SlotState(settings.max_num_seqs, max_model_len, settings.block_size)
        self.sampler = Sampler(settings.max_num_seqs, model_config.vocab_size, self.device)

    max_in_flight = 1
    kernel_account = ""  # no kernel runs on a CPU

    def launch(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """Begin a step; on a CPU it is over when this returns."""
        return self.execute(plan, masks)

    def collect(self, pending: StepResult) -> StepResult:
        """Wait for the step that `launch` began."""
        return pending

    def close(self) -> None:
        """Give back what would outlast the runner: nothing."""

    def execute(self, plan: StepPlan, masks: TokenMasks | None = None) -> StepResult:
        """Compute the plan's tokens, write their keys and values, and sample. Rows of the result are the plan's."""
        cache_bytes = sum(row.end for row in plan.rows) * self.kv_bytes_per_token
        is_small_step = is_small(plan.num_tokens, self.num_parameters, self.memory.weight_bytes + cache_bytes)
        with one_thread_if(is_small_step):
            return self._execute(plan, masks)

    @torch.inference_mode()
    def _execute(self, plan: StepPlan, masks: TokenMasks | None) -> StepResult:
        for request in plan.admitted:
            self.slots.admit(request)
            self.sampler.admit(request)
        if plan.zero_block_ids:
            for kv_cache in self.kv_caches:
                kv_cache[plan.zero_block_ids] = 0
        batch = self.slots.make_batch(plan.rows, self.local.num_kv_heads, self.workspace)
        prompt_ends = self._prompt_ends(batch)
        wanted = None if prompt_ends else self._sampling_tokens(batch)
        layer_batch = LayerBatch(self.cos[batch.positions], self.sin[batch.positions], batch.attention, wanted)
        hidden = self.model(batch.token_ids, layer_batch, self.kv_caches)
        prompt_logprobs = self._prompt_logprobs(batch, hidden, prompt_ends)
        errors = {
            row: NOT_FINITE
            for row, found in prompt_logprobs.items()
            if any(isnan(entry.logprobs[0]) for entry in found)
        }
        if not len(batch.sampling_rows):
            return StepResult([-1] * len(plan.rows), prompt_logprobs=prompt_logprobs, errors=errors)
        if wanted is None:
            hidden = hidden[batch.sampling_tokens]
        return self._sample(batch, hidden, masks, prompt_logprobs, errors)

    def _sample(
        self,
        batch: Batch,
        hidden: Tensor,
        masks: TokenMasks | None,
        prompt_logprobs: dict[int, list[TokenLogprobs]],
        errors: dict[int, str],
    ) -> StepResult:
        rows, slots = batch.sampling_rows, batch.slots[batch.sampling_rows]
        lengths = batch.ends[rows]
        logits = self.model.logits(hidden)
        if masks is not None:
            masks = TokenMasks(np.searchsorted(rows, masks.rows).tolist(), masks.bits)  # of the rows that sample
        sampled = self.sampler.sample(logits, slots, lengths, self.slots.token_ids, masks)
        token_ids = np.full(len(batch.slots), -1, dtype=np.int64)
        token_ids[rows] = sampled.token_ids.cpu().numpy()
        self.slots.token_ids[slots, lengths] = np.maximum(token_ids[rows], 0)
        return StepResult(
            token_ids.tolist(),
            logprobs={int(rows[i]): logprobs for i, logprobs in sampled.logprobs.items()},
            prompt_logprobs=prompt_logprobs,
            errors=errors | {int(rows[i]): NOT_FINITE for i in sampled.bad_rows},
        )

    @staticmethod
    def _sampling_tokens(batch: Batch) -> Tensor | None:
        """The tokens whose hidden states are sampled from; None where these are all."""
        is_all = len(batch.sampling_tokens) == len(batch.token_ids)
        return None if is_all else torch.from_numpy(batch.sampling_tokens)

    def _prompt_ends(self, batch: Batch) -> dict[int, int]:
        """Of the rows that ask for log-probabilities of prompt tokens p + 1 in this step: where the positions p end."""
        ends = np.minimum(batch.ends, self.slots.num_prompt_tokens[batch.slots] - 1)
        asks = (self.slots.wants_prompt_logprobs[batch.slots] >= 0) & (ends > batch.starts)
        return {row: int(ends[row]) for row in np.flatnonzero(asks).tolist()}

    def _prompt_logprobs(
        self, batch: Batch, hidden: Tensor, prompt_ends: dict[int, int]
    ) -> dict[int, list[TokenLogprobs]]:
        """Of the rows that ask: for each prompt position p computed in this step, log-probabilities of token p + 1."""
        found: dict[int, list[TokenLogprobs]] = {}
        for row, end in prompt_ends.items():
            slot, start, first = batch.slots[row], int(batch.starts[row]), int(batch.query_starts[row])
            targets = torch.from_numpy(self.slots.token_ids[slot, start + 1 : end + 1])
            wanted = int(self.slots.wants_prompt_logprobs[slot])
            found[row] = self.sampler.prompt_logprobs(
                self.model.logits, hidden[first : first + end - start], targets, wanted
            )
        return found
