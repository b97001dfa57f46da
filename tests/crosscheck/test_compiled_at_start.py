"""A start compiles all that plain steps launch: recorded on tensors without memory that pass for a GPU's."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="what a launch compiles is read off triton's functions")

import evenflow.kernels
from evenflow import LLM, SamplingParams
from evenflow.config import EngineConfig, resolve
from evenflow.distributed import TensorParallel, local_view
from evenflow.engine import building
from evenflow.kernels import language, self_check
from evenflow.kernels.linear import FEW_ROWS
from evenflow.kernels.self_check import PLANNED_ROWS, CheckedShape, all_checks
from evenflow.kernels.specializations import Specialization, _identity, record
from evenflow.layers.loading import Placement
from evenflow.model_config import ModelConfig
from evenflow.models import make_model
from evenflow.plan import known_models
from evenflow.platforms import detect
from evenflow.request import AdmittedRequest, ScheduledRow, StepPlan, TokenMasks
from evenflow.runner import device_runner
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.graphs import Sizes, decode_sizes, mixed_sizes

NO_MEMORY = torch.device("meta")
MAX_SEQS, MAX_TOKENS = max(PLANNED_ROWS), 4096
MODULES = [import_module(f"evenflow.kernels.{found.name}") for found in iter_modules(evenflow.kernels.__path__)]
PARAMS = {
    "plain": SamplingParams(temperature=1.0),
    "greedy": SamplingParams(temperature=0.0),
    "filtered": SamplingParams(top_p=0.9, top_k=40),
    "penalised": SamplingParams(repetition_penalty=1.2),
    "penalised, filtered": SamplingParams(presence_penalty=1.0, min_p=0.1),
    "biased": SamplingParams(logit_bias={5: 1.0}),
}


class NoMemory:
    """A Stream whose device computes nothing."""

    supports_graphs, device = False, NO_MEMORY

    def pinned(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype)


def recorded(work: Callable[[], object], modules: Sequence[ModuleType] = MODULES) -> dict[object, Specialization]:
    """What the kernels that `work` launches are compiled to."""
    if not modules:
        work()
        return {}
    found: dict[object, Specialization] = {}
    made = record(modules[0], "", lambda: found.update(recorded(work, modules[1:])))
    return found | {_identity(one): one for one in made}


@pytest.fixture(params=["sm_90", "sm_80", "gfx942"])
def arch(request, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda tensor: tensor.device.type == "meta"))
    copied = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: torch.zeros_like(x, device="cpu") if x.is_meta else copied(x))
    for module in (language, self_check):
        monkeypatch.setattr(module, "current_arch", lambda: request.param)
    monkeypatch.setattr("evenflow.kernels.attention_plan.current_arch", lambda: request.param)
    monkeypatch.setattr("evenflow.kernels.filter.current_arch", lambda: request.param)
    return request.param


def make_runner(name: str, folder, monkeypatch) -> tuple[DeviceRunner, CheckedShape]:
    """Of two layers of a known model; and what was to be checked."""
    config = known_models()[name] | {"num_hidden_layers": 2}
    (folder / "config.json").write_text(json.dumps(config))
    made = []

    def make(settings, model_config, directory):
        made.append(DeviceRunner(settings, model_config, directory, stream=NoMemory()))
        return made[0]

    shapes = []
    monkeypatch.setattr(building, "make_runner", make)
    monkeypatch.setattr(device_runner, "check_at_start", lambda shape, device: shapes.append(shape) or "")
    for function in ("fill_dummy", "fit_cache_scales"):
        monkeypatch.setattr(device_runner, function, lambda *_: None)
    LLM(
        str(folder), device="cpu", dtype="bfloat16", load_format="dummy", skip_tokenizer_init=True, max_model_len=1000,
        kv_cache_memory="1GiB", max_num_seqs=MAX_SEQS, max_num_batched_tokens=MAX_TOKENS,
    )  # fmt: skip
    return made[0], shapes[0]


def check(shape: CheckedShape, arch: str) -> None:
    for _, one in all_checks(shape, arch):
        list(one(self_check._Inputs(shape, NO_MEMORY)))


def steps(runner: DeviceRunner) -> None:
    """Of every size: decoding, mixed, and too large for a graph; then sampling, with every kind of parameters."""
    updates = runner.slots.write(StepPlan([], [ScheduledRow(0, 0, 1, True, [0])], [], []))
    runner.slots.send(*updates)
    for size in decode_sizes(MAX_SEQS):
        runner.model.logits(runner._forward(Sizes(size, size, 1)))
    for size in (*mixed_sizes(), 2064, MAX_TOKENS):
        for rows in {min(rows, size) for rows in (16, 48, 64, 1024)}:
            for is_sampling_only in (False, True):
                runner._forward(Sizes(size, rows, size, is_sampling_only))
    for num_rows in (1, 3, *FEW_ROWS, 300):
        hidden = torch.empty(num_rows, runner.local.hidden_size, dtype=torch.bfloat16, device=NO_MEMORY)
        logits = runner.model.logits(hidden)
        for params in PARAMS.values():
            for slot in range(num_rows):
                runner.sampler.admit(AdmittedRequest(slot, [1, 2, 3], 3, params, [], []))
            slots, lengths = np.arange(num_rows), np.full(num_rows, 3)
            runner.sampler.draw(logits, slots, lengths)
            words = -(-runner.local.vocab_size // 32)
            runner.sampler.draw(logits, slots, lengths, TokenMasks([0], np.zeros((1, words), dtype=np.int32)))


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b", "mistral-7b", "qwen2.5-7b", "qwen3-8b"])
def test_steps_launch_only_what_the_start_compiled(name, arch, tmp_path, monkeypatch):
    runner, shape = make_runner(name, tmp_path, monkeypatch)
    at_start, later = recorded(lambda: check(shape, arch)), recorded(lambda: steps(runner))
    assert len(later) > 20
    assert [later[key] for key in later.keys() - at_start.keys()] == []
    surplus = {at_start[key].kernel.rpartition(":")[2] for key in at_start.keys() - later.keys()}
    assert surplus <= {"_partial_logprobs_kernel", "_logprobs_kernel", "_rms_norm_kernel"}  # these some steps launch


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama-3.1-8b", "qwen2.5-7b", "qwen3-8b"])
def test_the_products_that_are_checked_are_the_models(name, num_ranks):
    """But for those with a bias, which are the library's."""
    config = replace(ModelConfig.from_hf(known_models()[name]), num_layers=1)
    tp = TensorParallel(0, num_ranks)
    model = make_model(config, Placement(NO_MEMORY, torch.bfloat16, tp))
    weights = {
        tuple(module.weight.shape)
        for path, module in model.named_modules()
        if getattr(module, "weight", None) is not None and module.weight.ndim == 2 and not path.endswith("embed_tokens")
        if getattr(module, "bias", None) is None
    }
    settings = resolve(EngineConfig(), config, detect()).settings
    shape = device_runner._checked_shape(settings, local_view(config, tp), num_ranks)
    assert {product[:2] for product in shape.products} == weights
    assert [product[0] for product in shape.products if product[2]] == [2 * config.intermediate_size // num_ranks]
