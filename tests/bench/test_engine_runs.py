"""The benchmarks that run the engine, each once on the demo model: what is counted, not how fast it is."""

import json

import pytest

from evenflow.bench import engines, tables
from evenflow.bench.ablation import VARIANTS, Variant, bench_ablation, row_of, why_skipped
from evenflow.bench.latency import cell_of
from evenflow.bench.startup import engine_phases, server_phases, summary
from evenflow.bench.throughput import rates, timed
from evenflow.bench.workload import BenchRequest
from evenflow.cli import main

REQUESTS = [BenchRequest([1] * 10, 10, 20), BenchRequest([1] * 30, 30, 40)]


def test_rates_by_hand():
    """100 tokens, 60 of them output; 2 s and 4 s: 50 and 25 tokens/s."""
    found = rates(REQUESTS, [2.0, 4.0])
    assert found["tokens_per_second"] == pytest.approx(37.5)
    assert found["tokens_per_second_ci95"] == pytest.approx(12.706 * 12.5)
    assert found["output_tokens_per_second"] == pytest.approx(37.5 * 0.6)
    assert found["requests_per_minute"] == pytest.approx(60 * 2 * 37.5 / 100)
    assert found["elapsed_time"] * found["tokens_per_second"] == pytest.approx(100)
    assert rates(REQUESTS, [2.0])["tokens_per_second_ci95"] is None


def test_a_run_that_lacks_tokens_is_an_error():
    asked = []

    def run(requests):
        asked.append([r.num_output_tokens for r in requests])
        return 59

    with pytest.raises(RuntimeError, match="engine made 59 output tokens of 60"):
        timed(run, REQUESTS, 1, "engine", is_shown=False)
    assert asked == [[8, 8], [20, 40]]  # the warm-up is short


def test_a_cell_by_hand():
    """Batch 4, 10 in, 6 out; the first token after 1, 2, 3 s, all after 11, 7, 13 s."""
    cell = cell_of(4, 10, 6, [1.0, 2.0, 3.0], [11.0, 7.0, 13.0])
    assert cell["ttft_s"] == 2.0
    assert cell["step_time_s"] == pytest.approx(2.0)  # differences 10, 5, 10 over 5 steps, the median
    assert cell["time_per_token_s"] == pytest.approx(0.5)
    assert cell["avg_latency"] == pytest.approx(31 / 3)
    assert (cell["prefill_tokens_per_s"], cell["decode_tokens_per_s"]) == (20.0, 2.0)
    assert set(cell["percentiles"]) == {"10", "25", "50", "75", "90", "99"}


def test_a_baseline_that_is_not_installed_is_said_before_the_work(monkeypatch, capsys):
    monkeypatch.setattr("evenflow.bench.throughput.find_spec", lambda name: None)
    monkeypatch.setattr("evenflow.bench.engines.open_engine", None)  # calling it would be a TypeError
    assert main(["bench", "throughput", "--baseline", "transformers"]) == 2
    assert "--baseline transformers needs it: pip install 'transformers" in capsys.readouterr().err


def test_throughput_beside_limit_and_transformers(tmp_path, capsys):
    output = tmp_path / "t.json"
    arguments = ["--dataset", "random", "--random-input-len", "12", "--random-output-len", "6", "--num-prompts", "5"]
    options = ["--repeats", "2", "--baseline", "transformers", "--output", str(output), "--no-progress"]
    assert main(["bench", "throughput", *arguments, *options]) == 0
    found = json.loads(output.read_text())
    fields = "model_id elapsed_time num_requests total_num_tokens requests_per_second tokens_per_second".split()
    assert [name for name in fields if name not in found] == []  # as `vllm bench throughput` writes
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (60, 30)
    assert len(found["seconds"]) == len(found["baseline"]["seconds"]) == 2
    assert found["over_baseline"] == pytest.approx(found["tokens_per_second"] / found["baseline"]["tokens_per_second"])
    assert found["roofline"]["machine"]["is_measured"]
    assert found["roofline"]["phases"]["decode"]["num_steps"] == 5
    assert {"date", "command", "versions", "commit", "cpu", "gpus"} <= set(found["environment"])
    assert found["engine"]["settings"]["enable_prefix_caching"] is False
    assert "limit, ideal" in capsys.readouterr().out


def test_throughput_on_sharegpt(tmp_path):
    turns = [{"value": "once upon a time there was"}, {"value": "a king who had three daughters"}]
    (tmp_path / "s.json").write_text(json.dumps([{"conversations": turns}] * 9))
    options = ["--dataset", "sharegpt", "--dataset-path", str(tmp_path / "s.json"), "--mode", "seed"]
    output = tmp_path / "t.json"
    assert main(["bench", "throughput", *options, "--num-prompts", "3", "--output", str(output)]) == 0
    assert "vLLM v0.1.4" in json.loads(output.read_text())["workload"]["note"]


def test_latency_over_a_grid(tmp_path):
    output = tmp_path / "l.json"
    options = ["--batch-size", "1", "2", "--input-len", "8", "--output-len", "4", "--repeats", "1", "--warmups", "0"]
    assert main(["bench", "latency", *options, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert [(cell["batch_size"], cell["input_len"]) for cell in found["cells"]] == [(1, 8), (2, 8)]
    for cell in found["cells"]:
        assert 0 < cell["ttft_s"] < cell["avg_latency"]
        assert cell["step_time_s"] == pytest.approx((cell["avg_latency"] - cell["ttft_s"]) / 3)
        assert cell["limit"]["decode_binding"] in ("memory bandwidth", "matrix rate")


@pytest.fixture(scope="module")
def ablated():
    options = {"kv_cache_memory": str(2 * 2**20), "max_model_len": 128}
    return bench_ablation("demo", options, num_requests=12, rounds=1, is_shown=False)


def test_ablation_takes_away_one_thing_at_a_time(ablated):
    found = {row["name"]: row for row in ablated["rows"]}
    assert list(found) == ["continuous batching", "paged KV cache", "prefix cache", "chunked prefill"]
    # What each idea is for, in counts: more run at a time.
    for name in ("continuous batching", "paged KV cache"):
        assert found[name]["mean_running"] > found[name]["mean_running_without"]
    assert all(row["ratio"] > 0 for row in ablated["rows"])


def test_what_does_nothing_on_a_cpu_is_in_the_table_and_says_so(ablated):
    table = tables.ablation(ablated)
    assert [row[3] for row in table.rows if row[0] in ("overlapped steps", "graphs")] == ["n/a", "n/a"]
    assert table.note.count("not applicable on a CPU") == 2
    assert all(len(row) == len(table.header) for row in table.rows)


def test_every_variant_switches_off_an_option_that_exists():
    assert [why_skipped(variant, is_gpu=True) for variant in VARIANTS] == [""] * len(VARIANTS)
    assert "has no option enable_magic" in why_skipped(Variant("x", "y", option="enable_magic"), is_gpu=True)


def test_a_ratio_is_one_of_means():
    def run(rate):
        return {"tokens_per_s": rate, "longest_step_s": 1 / rate, "mean_running": 2.0}

    row = row_of(VARIANTS[0], [run(8.0), run(12.0)], [run(2.0), run(6.0)])
    assert (row["ratio"], row["tokens_per_s"], row["longest_step_s_without"]) == (2.5, 10.0, 0.5)


def test_the_ablations_picture_can_be_drawn(ablated):
    from evenflow.bench.ablation import ablation_plot

    assert ablation_plot(ablated).startswith("<svg")


def test_phases_of_a_start_follow_each_other():
    phases = engine_phases({"model": "demo"})
    assert list(phases)[1:3] == ["import torch", "import evenflow"]
    assert list(phases)[-1] == "first token"
    assert all(seconds >= 0 for seconds in phases.values())


def test_a_server_starts_on_a_port_of_its_own_and_a_broken_one_says_why():
    assert list(server_phases({"model": "demo"})) == ["ready"]
    with pytest.raises(ValueError, match="none-such"):
        server_phases({"model": "none-such/model"})
    with pytest.raises(ValueError, match="none-such"):
        engine_phases({"model": "none-such/model"})


def test_the_first_start_is_told_apart():
    found = summary([{"a": 9.0, "b": 1.0}, {"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 2.0}, {"a": 2.0, "b": 5.0}])
    assert found["phases_s"] == {"a": 2.0, "b": 2.0}
    assert (found["total_s"], found["first_run_s"]) == (5.0, 10.0)


def test_a_named_shape_has_random_weights_and_is_the_same_twice():
    options = engines.engine_options("llama-2-7b", {"dtype": "bfloat16"})
    assert options["load_format"] == "dummy"
    assert options["skip_tokenizer_init"]
    assert options == engines.engine_options("LLaMA-2-7B", {"dtype": "bfloat16"})
    with pytest.raises(ValueError, match="--magic 3 is not implemented"):
        engines.engine_options("demo", {"magic": 3})
