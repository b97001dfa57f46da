"""`evenflow bench`: help, exit codes, a sweep on a socket, bad input; no torch where there is no engine."""

import json
import socket
import subprocess
import sys

import pytest
from servers import OpenAIServer

from evenflow.bench.environment import commit, machine_name, manifest
from evenflow.cli import main
from evenflow.cli.bench_options import KINDS

HEAVY = ("torch", "triton", "transformers", "numpy", "matplotlib")


def run_alone(*arguments):
    """(modules of HEAVY that were imported, exit code, output) of the command in a process of its own."""
    code = (
        "import sys; from evenflow.cli import main; code = main(sys.argv[1:]);"
        f"print('loaded', *[m for m in {HEAVY} if m in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    return done.stderr.splitlines()[-1].split()[1:], done.returncode, done.stdout


@pytest.mark.parametrize("kind", [(), *[(kind,) for kind in KINDS]], ids=lambda kind: "".join(kind) or "bench")
def test_help_has_examples_and_loads_nothing_heavy(kind):
    loaded, code, out = run_alone("bench", *kind, "--help")
    assert (loaded, code) == ([], 0)
    assert "examples:\n  evenflow bench" in out


def serve_bench(server, *arguments):
    sizes = ["--dataset", "random", "--random-input-len", "5", "--random-output-len", "4", "--num-prompts", "6"]
    return ["bench", "serving", "--base-url", server.url, *sizes, *arguments]


def test_a_client_needs_no_torch(server):
    loaded, code, _ = run_alone(*serve_bench(server))
    assert code == 0
    assert loaded == ["numpy"]


def test_serving_has_the_name_that_it_has_in_vllm_too(server, capsys):
    command, _, *arguments = serve_bench(server)
    assert main([command, "serve", *arguments]) == 0
    assert main(["bench", "serve", "--request-rate", "0"]) == 2
    assert "--request-rate 0.0 must be above 0" in capsys.readouterr().err


def test_a_sweep_writes_what_tools_of_vllm_read(server, tmp_path, capsys):
    options = ["--request-rate", "500", "inf", "--goodput", "e2el:60000", "--result-dir", str(tmp_path / "r")]
    more = ["--output", str(tmp_path / "all.json"), "--save-detailed", "--metric-percentiles", "25,99"]
    assert main(serve_bench(server, *options, *more, "--api-key", "k")) == 0
    runs = json.loads((tmp_path / "all.json").read_text())["runs"]
    assert [run["request_rate"] for run in runs] == [500.0, "inf"]
    assert [(run["completed"], run["failed"]) for run in runs] == [(6, 0)] * 2
    assert [run["total_output_tokens"] for run in runs] == [24, 24]
    assert all(run["request_goodput"] == run["request_throughput"] for run in runs)
    assert {"p25_ttft_ms", "p99_e2el_ms"} <= set(runs[0])
    one = json.loads((tmp_path / "r" / "openai-infqps-m.json").read_text())
    assert one["num_prompts"] == len(one["ttfts"]) == 6
    assert "versions" in one["environment"]
    assert len(server.bodies) == 1 + 2 * 6  # one to warm up
    assert server.headers[0]["authorization"] == "Bearer k"
    assert "normalized ms" in capsys.readouterr().out


def test_chat_sends_words(server):
    assert main(serve_bench(server, "--backend", "openai-chat", "--no-ignore-eos", "--extra-body", '{"seed": 5}')) == 0
    body = server.bodies[-1]
    assert body["path"] == "/v1/chat/completions"
    assert len(body["messages"][0]["content"].split()) == 5
    assert (body["max_completion_tokens"], body["seed"]) == (4, 5)
    assert "ignore_eos" not in body


def test_failures_are_counted_reported_and_the_exit_code(server, tmp_path, capsys):
    def answer(body):
        if len(server.bodies) % 3 == 0:
            return 503, b'{"error": {"message": "overloaded"}}'
        return server.complete(body)

    server.answer = answer
    assert main(serve_bench(server, "--output", str(tmp_path / "x.json"), "--max-concurrency", "1")) == 1
    found = json.loads((tmp_path / "x.json").read_text())
    assert (found["completed"], found["failed"]) == (4, 2)
    assert found["error_samples"] == ["HTTP 503: overloaded"]
    said = capsys.readouterr()
    assert "failed: HTTP 503: overloaded" in said.out
    assert "2 of 6 requests failed" in said.err


def test_a_limit_of_the_servers_gpu(server, tmp_path):
    options = ["--limit-model", "llama-2-7b", "--gpu", "a100", "--output", str(tmp_path / "x.json")]
    assert main(serve_bench(server, *options)) == 0
    assert json.loads((tmp_path / "x.json").read_text())["roofline"]["machine"]["name"] == "a100-80gb"


def unused_url():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


def test_no_server(capsys):
    assert main(["bench", "serving", "--base-url", unused_url()]) == 2
    assert "no server answers at http://127.0.0.1" in capsys.readouterr().err


def test_wrong_models_and_servers_that_are_none(server, capsys):
    assert main(serve_bench(server, "--model", "gpt-9")) == 2
    assert f"--model 'gpt-9' is not served at {server.url}; it has m" in capsys.readouterr().err
    server.models = []
    assert main(serve_bench(server)) == 2
    assert "lists no model (HTTP 200)" in capsys.readouterr().err


def test_a_server_that_refuses_the_first_request_is_told_before_the_load(server, capsys):
    server.answer = lambda body: (400, b'{"error": {"message": "max_tokens too large"}}')
    assert main(serve_bench(server)) == 2
    assert "does not take the first request: HTTP 400: max_tokens too large" in capsys.readouterr().err
    assert len(server.bodies) == 1


BAD = [
    (["serving", "--base-url", "ftp://x"], "--base-url 'ftp://x' must start with http"),
    (["serving", "--request-rate", "0"], "--request-rate 0.0 must be above 0"),
    (["serving", "--max-concurrency", "0"], "--max-concurrency 0"),
    (["serving", "--goodput", "ttft"], "--goodput 'ttft'"),
    (["serving", "--metric-percentiles", "a"], "--metric-percentiles 'a'"),
    (["serving", "--extra-body", "[1]"], "--extra-body '[1]' must be a JSON object"),
    (["serving", "--dataset", "sharegpt"], "--dataset sharegpt needs --dataset-path"),
    (["serving", "--dataset", "sharegpt", "--dataset-path", "x"], "needs --tokenizer"),
    (["serving", "--dataset", "trace", "--dataset-path", "/none.csv"], "'/none.csv' does not exist"),
    (["serving", "--limit-model", "demo"], "--limit-model needs --gpu"),
    (["serving", "--num-prompts", "0"], "num_prompts=0 must be at least 1"),
    (["throughput", "--repeats", "0"], "--repeats 0 must be at least 1"),
    (["throughput", "none-such"], "none-such"),
    (["throughput", "--dataset", "random"], "1024 + 128 tokens, above the context of 1024"),
    (["latency", "--output-len", "1"], "--output-len 1 must be at least 2"),
    (["latency", "--input-len", "2000"], "exceed the context of 1024"),
    (["ablation", "--only", "magic"], "--only 'magic' is none of continuous batching"),
    (["ablation", "--rounds", "0"], "--rounds 0 must be at least 1"),
    (["startup", "--repeats", "0"], "--repeats 0 must be at least 1"),
    (["paper", "--models", "llama-2-7b", "--dataset-path", "x"], "llama-2-7b is a shape and has no tokenizer"),
    (["paper", "--from", "/none.json"], "/none.json"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_line_that_names_it(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("evenflow: error: ")
    assert said.count("\n") == 1


def test_the_manifest_says_what_it_ran_on():
    found = manifest()
    assert found["versions"]["evenflow"]
    assert found["cpu"]["num_cores"] >= 1
    assert json.loads(json.dumps(found)) == found
    assert commit() is None or len(commit().removesuffix("-dirty")) >= 12
    assert machine_name({"gpus": [{"name": "X"}] * 4}) == "4 x X"


def test_the_server_of_the_tests_speaks_as_one():
    with OpenAIServer() as one:
        assert one.complete({"prompt": [1, 2], "max_tokens": 1})[1].endswith(b"data: [DONE]\n\n")
