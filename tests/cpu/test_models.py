"""Every model type and rope type against transformers in float32."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from checkpoints import CASES, VOCAB, Checkpoint, make_checkpoint

from evenflow.config import EngineConfig, resolve
from evenflow.kernels.attention import make_workspace
from evenflow.layers.attention import LayerBatch
from evenflow.layers.loading import Placement
from evenflow.layers.rotary import cos_sin
from evenflow.model_config import ModelConfig
from evenflow.models import make_model
from evenflow.platforms import cpu
from evenflow.request import AdmittedRequest, ScheduledRow
from evenflow.runner.batch import SlotState
from evenflow.runner.weights import load_weights
from evenflow.sampling_params import SamplingParams

BLOCK_SIZE = 8
LENGTHS = (100, 3, 41, 64)
# Measured over all cases: 1.1e-5, for logits of up to 6.4.
TOLERANCE = 3e-5


def model_logits(directory, sequences: list[list[int]], chunk: int, *, only_last: bool = False) -> list[torch.Tensor]:
    """Logits of every position, all sequences in one batch, `chunk` tokens of each per step, on scattered blocks.

    only_last: of the last position of each alone, and nothing else is wanted of the model.
    """
    config = ModelConfig.from_hf(json.loads((directory / "config.json").read_text()))
    model = make_model(config, Placement(torch.device("cpu"), torch.float32))
    load_weights(model, directory, is_tied=config.tie_word_embeddings)
    longest = max(map(len, sequences))
    slots = SlotState(len(sequences), longest, BLOCK_SIZE)
    num_blocks = len(sequences) * -(-longest // BLOCK_SIZE)
    free = np.random.default_rng(0).permutation(num_blocks).tolist()
    shape = (num_blocks, 2, config.num_kv_heads, BLOCK_SIZE, config.head_dim)
    caches = [torch.zeros(shape) for _ in range(config.num_layers)]
    cos, sin = cos_sin(config.rope, config.head_dim, longest, torch.device("cpu"))
    for slot, token_ids in enumerate(sequences):
        slots.admit(AdmittedRequest(slot, token_ids, len(token_ids), SamplingParams(), [], []))
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for start in range(0, longest, chunk):
        rows = []
        for slot, token_ids in enumerate(sequences):
            end = min(start + chunk, len(token_ids))
            if start < end:
                needed = -(-end // BLOCK_SIZE) - -(-start // BLOCK_SIZE)
                is_last = end == len(token_ids)
                rows.append(ScheduledRow(slot, start, end, is_last, [free.pop() for _ in range(needed)]))
        batch = slots.make_batch(rows, config.num_kv_heads, make_workspace(caches[0]))
        wanted = torch.from_numpy(batch.sampling_tokens) if only_last else None
        with torch.inference_mode():
            layer_batch = LayerBatch(cos[batch.positions], sin[batch.positions], batch.attention, wanted)
            out = model.logits(model(batch.token_ids, layer_batch, caches))
        counts = [int(row.samples) if only_last else row.end - row.start for row in rows]
        for row, part in zip(rows, out.split(counts), strict=True):
            logits[row.slot].append(part)
    return [torch.cat(parts) for parts in logits]


@pytest.fixture(scope="module", params=sorted(CASES))
def case(request, tmp_path_factory) -> Checkpoint:
    return make_checkpoint(tmp_path_factory.mktemp("case"), request.param)


@pytest.mark.parametrize("chunk", [1000, 7])
def test_logits_equal_transformers(case, chunk):
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    for token_ids, logits in zip(sequences, model_logits(case.directory, sequences, chunk), strict=True):
        torch.testing.assert_close(logits, case.logits(token_ids), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("piece_rows", [8192, 10])
def test_products_added_to_the_residual_give_the_same_logits(case, monkeypatch, piece_rows):
    """As a GPU does it with many tokens: in the first steps here, and no more in the last, which have few."""
    added = []
    monkeypatch.setattr("evenflow.layers.linear.ADDING_PIECE_ROWS", piece_rows)
    addmm_ = torch.Tensor.addmm_
    monkeypatch.setattr("evenflow.layers.linear.adding_product_rows", lambda arch: 20)
    monkeypatch.setattr(torch.Tensor, "addmm_", lambda *args: added.append(1) or addmm_(*args))
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    for token_ids, logits in zip(sequences, model_logits(case.directory, sequences, 7), strict=True):
        torch.testing.assert_close(logits, case.logits(token_ids), rtol=0, atol=TOLERANCE)
    config = json.loads((case.directory / "config.json").read_text())
    has_bias = config.get("attention_bias") and config["model_type"] == "llama"
    assert added or has_bias


@pytest.mark.parametrize("rows_to_add", [1 << 62, 1])
@pytest.mark.parametrize("chunk", [1000, 7])
def test_wanted_tokens_alone_have_the_same_logits(case, monkeypatch, chunk, rows_to_add):
    """Of some steps one or all rows, of others none; also where products are added to the residual."""
    monkeypatch.setattr("evenflow.layers.linear.adding_product_rows", lambda arch: rows_to_add)
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, VOCAB, length).tolist() for length in LENGTHS]
    found = model_logits(case.directory, sequences, chunk, only_last=True)
    for token_ids, logits in zip(sequences, found, strict=True):
        assert len(logits) == 1
        torch.testing.assert_close(logits, case.logits(token_ids)[-1:], rtol=0, atol=TOLERANCE)


def test_the_cases_differ(tmp_path):
    """What a case is about changes the logits by far more than the tolerance; else the comparison shows nothing."""
    token_ids = np.random.default_rng(1).integers(0, VOCAB, 100).tolist()
    base = make_checkpoint(tmp_path / "base").logits(token_ids)
    for name in ("llama-linear", "llama-llama3", "llama-yarn", "llama-yarn-betas", "llama-theta"):
        other = make_checkpoint(tmp_path / name, name).logits(token_ids)
        assert (other - base).abs().max() > 100 * TOLERANCE, name
    window = make_checkpoint(tmp_path / "window", "mistral-window").logits(token_ids)
    whole = make_checkpoint(tmp_path / "whole", "mistral").logits(token_ids)
    assert (window - whole)[:24].abs().max() < TOLERANCE < 100 * TOLERANCE < (window - whole)[24:].abs().max()


@pytest.mark.parametrize(
    ("kind", "parameters", "context"),
    [
        ("linear", {"factor": 4.0}, 1024),
        ("yarn", {"factor": 4.0, "original_max_position_embeddings": 256}, 1024),
        ("dynamic", {"factor": 4.0}, 256),
        ("default", {}, 256),
    ],
)
def test_context_is_stretched_as_the_rope_kind_says(tmp_path, kind, parameters, context):
    rope = {"rope_type": kind, "rope_theta": 10000.0, **parameters}
    directory = make_checkpoint(tmp_path, rope_parameters=rope).directory
    hf = json.loads((directory / "config.json").read_text())
    config = ModelConfig.from_hf(hf)
    assert config.max_context == context
    # The older spelling of the same thing.
    old = {key: value for key, value in hf.items() if key != "rope_parameters"}
    old |= {"rope_theta": 10000.0, "rope_scaling": {"type": kind, **parameters} if parameters else None}
    assert ModelConfig.from_hf(old) == config
    settings = resolve(EngineConfig(model="m"), config, cpu.detect()).settings
    assert settings.max_model_len == context
    assert all(getattr(settings, f.name) is not None for f in dataclasses.fields(settings) if f.name != "revision")
