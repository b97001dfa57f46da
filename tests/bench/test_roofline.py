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


# A layer: q and o 64 each, k and v 32 each, the gated layer 3 * 128, two norms of 8: 592. Two layers 1,184; head 800.
BODY, HEAD = 2 * (2 * 64 + 2 * 32 + 3 * 128 + 16), 800
MACHINE = Machine("m", bandwidth_bytes_per_s=1000.0, flops=50_000.0, memory_bytes=10**6)


def test_parameters_and_bytes_by_hand():
    work = Work.of(tiny(), "bfloat16")
    assert (work.body, work.head) == (BODY, HEAD) == (1184, 800)
    assert work.read_bytes == 2 * 1984
    assert work.layer_kv_bytes == 2 * 2 * 2 * 2  # k and v, 2 heads of 2, 2 bytes
    assert Work.of(tiny(), "bfloat16", "float8_e4m3fn").layer_kv_bytes == 8


def test_one_request_by_hand():
    """3 prompt tokens, 2 output tokens: one step with the prompt, one with the first output token."""
    limit = offline_limit([(3, 2)], Work.of(tiny(), "bfloat16"), MACHINE)
    kv = 16 * 2  # bytes a token, both layers
    first_bytes, second_bytes = 2 * 1984 + 3 * kv, 2 * 1984 + (3 + 1) * kv
    pairs = 2 * (1 + 2 + 3)  # over both layers
    first_flops = 2 * 1184 * 3 + 2 * 800 + 4 * 4 * 2 * pairs
    second_flops = 2 * 1184 + 2 * 800 + 4 * 4 * 2 * (2 * 4)
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


def simulated(lengths, work, machine, max_num_seqs, budget, capacity):
    """The same batches, one token at a time, with nothing clever."""
    layers, windows = work.model.num_layers, work.model.windows
    waiting, running, total_s = list(lengths), [], 0.0
    while waiting or running:
        while waiting and len(running) < max_num_seqs:
            if sum(p + o for _, p, o in running) + sum(waiting[0]) > capacity:
                break
            running.append([0, *waiting.pop(0)])
        left, num_bytes, flops = budget, work.read_bytes, 0
        for row in sorted(running, key=lambda row: row[0] < row[1]):  # decoding ones first
            count = 1 if row[0] >= row[1] else min(left, row[1] - row[0])
            left -= count
            for window in windows:
                num_bytes += work.layer_kv_bytes * (row[0] if window is None else min(row[0], window - 1))
                for token in range(row[0], row[0] + count):
                    seen = token + 1 if window is None else min(token + 1, window)
                    flops += 4 * work.model.num_heads * work.model.head_dim * seen
            num_bytes += work.layer_kv_bytes * layers * count
            flops += 2 * work.body * count
            row[0] += count
            flops += 2 * work.head * (count > 0 and row[0] >= row[1])
        total_s += max(num_bytes / machine.bandwidth_bytes_per_s, flops / machine.flops)
        running = [row for row in running if row[0] < row[1] + row[2] - 1]
    return total_s


@pytest.mark.parametrize("model", [tiny(), tiny(model_type="mistral", sliding_window=9)], ids=["full", "window"])
@pytest.mark.parametrize(("max_num_seqs", "budget", "capacity"), [(64, 4096, 10**6), (5, 64, 10**6), (64, 100, 300)])
def test_the_limit_is_that_of_a_plain_simulation(model, max_num_seqs, budget, capacity):
    lengths = sample_lengths(40, context=128)[0]
    work = Work.of(model, "bfloat16")
    bounds = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": budget, "kv_tokens": capacity}
    limit = offline_limit(lengths, work, MACHINE, **bounds)
    assert limit.ideal_s == pytest.approx(simulated(lengths, work, MACHINE, max_num_seqs, budget, capacity), rel=1e-9)
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
    assert work.body + work.head == pytest.approx(parameters, rel=2e-3)
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
    compute_s = 2 * (work.body * sum(i + o - 1 for i, o in lengths) + work.head * outputs) / machine.flops
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
