"""The physical limit beside arithmetic done by hand, a plain simulation of it, and figures computed elsewhere."""

import math

import pytest

from evenflow.bench.roofline import (
    Machine,
    Work,
    alone_s,
    find_machine,
    machine_of,
    measure_cpu,
    offline_limit,
    report,
    with_devices,
)
from evenflow.bench.workload import sample_lengths
from evenflow.model_config import ModelConfig
from evenflow.plan import read_model_config
from evenflow.platforms.specs import all_specs, find_specs

REQUIRED = (
    "a100-80gb l40 l40s h100-sxm h200 b200 mi210 mi250x mi300a mi300x mi325x mi355x rx-7900-xtx rtx-4090"
).split()


def tiny(**changes):
    hf = {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        **changes,
    }
    return ModelConfig.from_hf(hf)


# A layer: q and o 64 each, k and v 32 each, the gated layer 3 * 128, two norms of 8: 592. Every token needs the first
# norm, k and v of the last one: 72. The vocabulary 800.
BODY, TOP = 592 + 72, 592 - 72 + 800
MACHINE = Machine("m", bandwidth_bytes_per_s=1000.0, flops=50_000.0, memory_bytes=10**6)


def test_parameters_and_bytes_by_hand():
    work = Work.of(tiny(), "bfloat16")
    assert (work.body, work.top) == (BODY, TOP) == (664, 1320)
    assert work.read_bytes == 2 * 1984  # two layers and the vocabulary
    assert work.layer_kv_bytes == 2 * 2 * 2 * 2  # k and v, 2 heads of 2, 2 bytes
    assert Work.of(tiny(), "bfloat16", "float8_e4m3fn").layer_kv_bytes == 8


def test_one_request_by_hand():
    """3 prompt tokens, 2 output tokens: one step with the prompt, one with the first output token."""
    limit = offline_limit([(3, 2)], Work.of(tiny(), "bfloat16"), MACHINE)
    kv = 16 * 2  # bytes a token, both layers
    first_bytes, second_bytes = 2 * 1984 + 3 * kv, 2 * 1984 + (3 + 1) * kv
    pairs = (1 + 2 + 3) + 3  # in the last layer, of the third token
    first_flops = 2 * 664 * 3 + 2 * 1320 + 4 * 4 * 2 * pairs
    second_flops = 2 * 664 + 2 * 1320 + 4 * 4 * 2 * (2 * 4)
    assert (limit.prefill.num_steps, limit.decode.num_steps) == (1, 1)
    assert (limit.prefill.num_bytes, limit.prefill.flops) == (first_bytes, first_flops)
    assert (limit.decode.num_bytes, limit.decode.flops) == (second_bytes, second_flops)
    memory = [first_bytes / 1000, second_bytes / 1000]
    compute = [first_flops / 50_000, second_flops / 50_000]
    assert limit.ideal_s == pytest.approx(sum(map(max, memory, compute)))
    assert [limit.prefill.ideal_s, limit.decode.ideal_s] == pytest.approx([*map(max, memory, compute)])
    assert limit.no_overlap_s == pytest.approx(sum(memory) + sum(compute))
    assert limit.first_token_s == pytest.approx(max(memory[0], compute[0]))
    assert limit.binding == "memory bandwidth"


def test_a_prompt_in_two_chunks_by_hand():
    """5 prompt tokens, 3 a step: the first step samples nothing, and reads neither TOP nor, in the last layer, keys."""
    limit = offline_limit([(5, 1)], Work.of(tiny(), "bfloat16"), MACHINE, max_num_batched_tokens=3)
    first_bytes, second_bytes = 2 * 664 + 16 * 2 * 3, 2 * 1984 + 16 * 2 * (2 + 3)
    first_flops = 2 * 664 * 3 + 4 * 4 * 2 * (1 + 2 + 3)
    second_flops = 2 * 664 * 2 + 2 * 1320 + 4 * 4 * 2 * ((4 + 5) + 5)
    assert (limit.prefill.num_steps, limit.decode.num_steps) == (2, 0)
    assert limit.prefill.num_bytes == first_bytes + second_bytes
    assert limit.prefill.flops == first_flops + second_flops


def layer_parts(model):
    """Parameters of each part of a layer."""
    hidden, inner = model.hidden_size, model.intermediate_size
    q, kv = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    head_norm = model.head_dim * (model.model_type == "qwen3")
    return {
        "input_layernorm": hidden,
        "q_proj": (hidden + model.qkv_bias) * q,
        "k_proj": (hidden + model.qkv_bias) * kv,
        "v_proj": (hidden + model.qkv_bias) * kv,
        "q_norm": head_norm,
        "k_norm": head_norm,
        "o_proj": (q + model.attention_out_bias) * hidden,
        "post_attention_layernorm": hidden,
        "gate_proj": (hidden + model.mlp_bias) * inner,
        "up_proj": (hidden + model.mlp_bias) * inner,
        "down_proj": (inner + model.mlp_bias) * hidden,
    }


def counted(model, chunks):
    """(bytes, flops) of a step in bfloat16, token by token and layer by layer. chunks: (start, end, prompt length).

    A token's hidden state after a layer is needed by the next layer's keys and values, or to sample from.
    """
    parts, vocabulary = layer_parts(model), model.vocab_size * model.hidden_size
    weights, stored, read, flops = {}, 0, set(), 0
    for layer, window in enumerate(model.windows):
        for row, (start, end, prompt) in enumerate(chunks):
            for token in range(start, end):
                stored += 1
                needed = {"input_layernorm", "k_proj", "v_proj", "k_norm"}
                if layer < model.num_layers - 1 or token >= prompt - 1:
                    needed = parts
                    keys = range(0 if window is None else max(token - window + 1, 0), token + 1)
                    flops += 4 * model.num_heads * model.head_dim * len(keys)
                    read.update((layer, row, key) for key in keys if key < start)
                weights |= {(layer, part): parts[part] for part in needed}
                flops += 2 * sum(parts[part] for part in needed)
    if num_sampled := sum(end >= prompt for _, end, prompt in chunks):
        weights["vocabulary"] = vocabulary
        flops += 2 * vocabulary * num_sampled
    kv = 2 * model.num_kv_heads * model.head_dim
    return 2 * (sum(weights.values()) + kv * (stored + len(read))), flops


def simulated_steps(lengths, max_num_seqs, budget, capacity):
    """Chunks of the same batches, with nothing clever."""
    waiting, running = list(lengths), []
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            if sum(p + o for _, p, o in running) + sum(waiting[0]) > capacity:
                break
            running.append([0, *waiting.pop(0)])
        left, chunks = budget, []
        for row in sorted(running, key=lambda row: row[0] < row[1]):  # decoding ones first
            count = 1 if row[0] >= row[1] else min(left, row[1] - row[0])
            left -= count
            if count:
                chunks.append((row[0], row[0] + count, row[1]))
            row[0] += count
        yield chunks
        running = [row for row in running if row[0] < row[1] + row[2] - 1]


SLIDING, FULL = "sliding_attention", "full_attention"
MODELS = {
    "llama": tiny(attention_bias=True, mlp_bias=True),
    "one-layer": tiny(num_hidden_layers=1),
    "mistral": tiny(model_type="mistral", sliding_window=9),
    "qwen2": tiny(model_type="qwen2", use_sliding_window=True, sliding_window=9, layer_types=[FULL, SLIDING]),
    "qwen3": tiny(
        model_type="qwen3", head_dim=4, use_sliding_window=True, sliding_window=9, layer_types=[SLIDING, FULL]
    ),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize(("max_num_seqs", "budget", "capacity"), [(64, 4096, 10**6), (2, 16, 10**6), (64, 100, 300)])
def test_the_limit_is_that_of_a_plain_simulation(model, max_num_seqs, budget, capacity):
    lengths = sample_lengths(40, context=128)[0]
    bounds = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "kv_tokens": capacity}
    limit = offline_limit(lengths, Work.of(model, "bfloat16"), MACHINE, **bounds)
    num_bytes, flops, ideal_s = {True: 0, False: 0}, {True: 0, False: 0}, 0.0
    for chunks in simulated_steps(lengths, max_num_seqs, budget, capacity):
        has_prompts = any(start < prompt for start, _, prompt in chunks)
        step_bytes, step_flops = counted(model, chunks)
        num_bytes[has_prompts] += step_bytes
        flops[has_prompts] += step_flops
        ideal_s += max(step_bytes / MACHINE.bandwidth_bytes_per_s, step_flops / MACHINE.flops)
    assert (limit.prefill.num_bytes, limit.decode.num_bytes) == (num_bytes[True], num_bytes[False])
    assert (limit.prefill.flops, limit.decode.flops) == (flops[True], flops[False])
    assert limit.ideal_s == pytest.approx(ideal_s, rel=1e-9)
    assert limit.ideal_s <= limit.no_overlap_s <= 2 * limit.ideal_s


@pytest.mark.parametrize(
    ("model", "parameters", "kv_bytes"),
    [
        ("llama-2-7b", 6.61e9, 524_288),
        ("llama-2-13b", 12.85e9, 819_200),
        ("llama-2-70b", 68.7e9, 327_680),
        ("llama-3.1-8b", 7.50e9, 131_072),
    ],
)
def test_known_models(model, parameters, kv_bytes):
    work = Work.of(read_model_config(model), "float16")
    assert work.body + work.top == pytest.approx(parameters, rel=2e-3)
    assert work.layer_kv_bytes * work.model.num_layers == kv_bytes


@pytest.mark.parametrize("gpu", ["a100-80gb", "mi210", "h200"])
def test_a_thousand_requests_take_no_less_than_the_closed_form(gpu):
    """T >= weights * steps / BW + K * sum(o * i + o * (o + 1) / 2) / BW, and steps >= sum(o) / most that run."""
    lengths, _ = sample_lengths(1000)
    work, machine = Work.of(read_model_config("llama-2-7b"), "float16"), machine_of(find_specs(gpu))
    limit = offline_limit(lengths, work, machine)
    kv = work.layer_kv_bytes * work.model.num_layers * sum(o * i + o * (o + 1) // 2 for i, o in lengths)
    outputs = sum(o for _, o in lengths)
    weights = work.read_bytes * outputs / 256
    memory_s = (kv + weights) / machine.bandwidth_bytes_per_s
    compute_s = 2 * (work.body * sum(i + o - 1 for i, o in lengths) + work.top * outputs) / machine.flops
    assert max(memory_s, compute_s) < limit.ideal_s < 2 * max(memory_s, compute_s)  # the caches hold fewer


def test_more_devices_and_a_faster_machine_are_never_slower():
    lengths, _ = sample_lengths(60)
    work = Work.of(read_model_config("llama-2-13b"), "float16")
    one = machine_of(find_specs("a100"))
    two = with_devices(one, 2)
    assert two.memory_bytes == 160 * 10**9
    times = [offline_limit(lengths, work, machine).ideal_s for machine in (machine_of(find_specs("mi210")), one, two)]
    assert times == sorted(times, reverse=True)


def test_eight_bit_weights_take_the_eight_bit_rate_only_where_there_is_one():
    assert machine_of(find_specs("h100"), dtype="float8_e4m3fn").flops == 1979e12
    assert machine_of(find_specs("a100"), dtype="float8_e4m3fn").flops == 312e12


def test_a_request_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="a request of 90 tokens does not fit the KV cache of 64"):
        offline_limit([(80, 10)], Work.of(tiny(), "bfloat16"), MACHINE, kv_tokens=64)


def test_the_report_has_fractions_per_phase():
    work = Work.of(tiny(), "bfloat16")
    found = report([(3, 2)], 100.0, work, MACHINE)
    limit = offline_limit([(3, 2)], work, MACHINE)
    assert found["fraction_of_ideal"] == pytest.approx(limit.ideal_s / 100)
    assert found["limit_total_tokens_per_s"] == pytest.approx(5 / limit.ideal_s)
    assert found["phases"]["decode"]["binding"] == "memory bandwidth"
    slow = Machine("m", 1e12, 100.0, 10**6)
    assert report([(3, 2)], 100.0, work, slow)["binding"] == "matrix rate"


def test_one_request_alone_takes_as_long_as_its_steps():
    work = Work.of(tiny(), "bfloat16")
    assert alone_s(3, 2, work, MACHINE) == pytest.approx(offline_limit([(3, 2)], work, MACHINE).ideal_s)


@pytest.mark.parametrize("key", REQUIRED)
def test_every_gpu_has_its_numbers_and_their_source(key):
    specs = all_specs()[key]
    assert len(specs.source) > 20
    # Between a desktop card and the largest accelerator: a slip of a power of ten is seen.
    assert 2e11 < specs.bandwidth_bytes_per_s < 1e13
    assert 5e13 < specs.bf16_flops < 3e15
    assert 2e10 < specs.memory_bytes < 3e11
    # Flops per byte of every such GPU lie between those of a 7900 XTX and those of an L40S.
    assert 100 < specs.bf16_flops / specs.bandwidth_bytes_per_s < 430


@pytest.mark.parametrize(
    ("name", "key"), [("NVIDIA H100 80GB HBM3", "h100-sxm"), ("AMD Instinct MI300X", "mi300x"), ("GeForce 2", None)]
)
def test_machines_are_found_by_what_drivers_call_them(name, key):
    found = find_machine(name, 2)
    assert (found and found.name) == (key and f"2 x {key}")


def test_the_cpu_at_hand_is_measured():
    found = measure_cpu("float32", 2**20, 2**33)
    assert found.is_measured
    assert 1e8 < found.bandwidth_bytes_per_s < 1e13
    assert 1e8 < found.flops < 1e14
    assert "float32" in found.source
    assert math.isfinite(found.flops)
