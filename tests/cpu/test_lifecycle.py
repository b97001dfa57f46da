"""A server's life, from the outside: start, overload, drain, and the death of either process."""

import gzip
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from serving import ServerProcess, is_alive

LONG = {"prompt": "Once upon a time", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def begin(server, body=LONG):
    """A stream whose first chunk has come; returns the response and its lines."""
    request = server.client.build_request("POST", "/v1/completions", json=body)
    response = server.client.send(request, stream=True)
    assert response.status_code == 200
    lines = response.iter_lines()
    assert next(lines).startswith("data: ")
    return response, lines


def rest(lines):
    """The data of the events that follow."""
    return [line.removeprefix("data: ") for line in lines if line]


def run(*args):
    command = [sys.executable, "-m", "evenflow", "serve", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_a_drain_lets_answers_end_and_takes_nothing_new():
    with ServerProcess() as server:
        response, lines = begin(server, LONG | {"max_tokens": 300})
        engine = server.engine_pid()
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(server.url + "/ready").status_code == 200:
            pass
        refused = httpx.post(server.url + "/v1/completions", json=LONG)
        assert refused.status_code == 503
        assert "shutting down" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        events = rest(lines)
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
        response.close()
        assert server.wait() == 0
        assert not is_alive(engine)


def test_a_second_signal_stops_now():
    with ServerProcess("--max-model-len", "1024") as server:
        response, lines = begin(server, LONG | {"n": 100})
        server.process.send_signal(signal.SIGTERM)
        while httpx.get(server.url + "/ready").status_code == 200:
            pass
        server.process.send_signal(signal.SIGTERM)
        assert "error" in json.loads(rest(lines)[-2])
        response.close()
        assert server.wait() == 0


def test_the_drain_ends_in_time():
    with ServerProcess("--drain-timeout", "0.1") as server:
        response, lines = begin(server, LONG | {"n": 100})
        server.process.send_signal(signal.SIGINT)
        assert "error" in json.loads(rest(lines)[-2])
        response.close()
        assert server.wait() == 0
        assert any("cut off" in line for line in server.lines)


def test_a_killed_engine_ends_the_server_with_one_line_of_cause():
    with ServerProcess(exit_code=1) as server:
        response, lines = begin(server)
        os.kill(server.engine_pid(), signal.SIGKILL)
        events = rest(lines)
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["type"] == "overloaded_error"
        response.close()
        assert server.wait() == 1
        assert [line for line in server.lines if "error" in line] == [
            "evenflow: error: the engine process was killed by SIGKILL (out of memory?)"
        ]


def test_a_hung_engine_is_found_out_and_killed():
    with ServerProcess("--engine-timeout", "3", exit_code=1) as server:
        engine = server.engine_pid()
        response, lines = begin(server)
        os.kill(engine, signal.SIGSTOP)
        assert "error" in json.loads(rest(lines)[-2])
        response.close()
        assert server.wait() == 1
        assert not is_alive(engine)
        assert any("no sign of life for 3 s" in line for line in server.lines)


def test_an_idle_engine_that_is_stopped_is_not_ready():
    with ServerProcess(exit_code=1) as server:
        assert server.client.get("/ready").status_code == 200
        engine = server.engine_pid()
        os.kill(engine, signal.SIGSTOP)
        assert server.client.get("/ready").json() == {"status": "not answering"}
        assert server.client.get("/health").status_code == 200
        os.kill(engine, signal.SIGCONT)
        assert server.client.get("/ready").status_code == 200
        os.kill(engine, signal.SIGKILL)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_engine_dies_with_the_server(is_stopped):
    with ServerProcess(exit_code=-signal.SIGKILL) as server:
        engine = server.engine_pid()
        if is_stopped:
            os.kill(engine, signal.SIGSTOP)
        server.process.kill()
        server.process.wait()
        while is_alive(engine):
            pass


def test_a_full_queue_answers_429():
    with ServerProcess("--max-num-seqs", "1", "--max-queue", "1") as server:
        first, _ = begin(server)
        second = server.client.send(server.client.build_request("POST", "/v1/completions", json=LONG), stream=True)
        third = server.client.post("/v1/completions", json=LONG)
        assert third.status_code == 429
        assert third.json()["error"]["type"] == "rate_limit_error"
        assert int(third.headers["retry-after"]) > 0
        first.close()
        second.close()
        server.wait_idle()
        assert server.client.post("/v1/completions", json=LONG | {"max_tokens": 1, "stream": False}).status_code == 200
        assert "429" in server.client.get("/metrics").text


def test_keys_and_names_and_json_lines(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("secret-1\n\nsecret-2\n")
    args = ("--api-key-file", str(keys), "--served-model-name", "tales", "--log-format", "json")
    with ServerProcess(*args) as server:
        assert server.client.get("/v1/models").status_code == 401
        assert [server.client.get(path).status_code for path in ("/health", "/ready")] == [200, 200]  # probes have none
        headers = {"Authorization": "Bearer secret-2"}
        assert server.client.get("/v1/models", headers=headers).json()["data"][0]["id"] == "tales"
        body = {"model": "tales", "prompt": "a", "max_tokens": 1}
        assert server.client.post("/v1/completions", json=body, headers=headers).json()["model"] == "tales"
        assert server.client.post("/v1/completions", json=body | {"model": "demo"}, headers=headers).status_code == 404
        server.process.send_signal(signal.SIGTERM)
        server.wait()
        lines = [json.loads(line) for line in server.lines]
        assert lines[0]["message"] == "loading tales; the address is told when it answers"
        assert {"path": "/v1/models", "status": 401}.items() <= lines[3].items()
        assert "secret" not in "".join(server.lines)


def test_traces_are_sent_to_a_collector_and_hold_no_text():
    received, has_come = [], threading.Event()

    class Collector(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            has_come.set()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Collector) as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        with ServerProcess("--otlp-endpoint", f"http://127.0.0.1:{collector.server_port}") as server:
            body = {"prompt": "a secret text", "max_tokens": 3, "ignore_eos": True}
            assert server.client.post("/v1/completions", json=body).status_code == 200
            assert server.client.post("/v1/completions", json=body | {"n": 0}).status_code == 400
            server.process.send_signal(signal.SIGTERM)
            server.wait()
        assert has_come.wait(30)
        collector.shutdown()
        thread.join()
    data = b"".join(gzip.decompress(part) if part[:2] == b"\x1f\x8b" else part for part in received)
    assert b"llm_request" in data
    assert b"gen_ai.usage.output_tokens" in data
    assert b"secret" not in data


def test_a_port_in_use_is_one_line():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = run("--port", str(port))
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in found.stderr


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (("--port", "70000"), "port=70000 must be from 0 to 65535"),
        (("--api-key", " "), "api_key is empty"),
        (
            ("--api-key-file", "/nowhere"),
            "api_key_file='/nowhere' cannot be read (No such file or directory); name a text",
        ),
        (("--log-format", "xml"), "xml"),
        (("/nowhere/at-all",), "/nowhere/at-all"),
        (("--max-queue", "-1"), "max_queue=-1 must be from 0 to 1048576"),
        (("--max-model-len", "99999"), "max_model_len=99999 exceeds the model's context"),  # the engine says this
        (("--kv-cache-memory", "1KiB"), "max_model_len"),
    ],
)
def test_a_server_that_cannot_start_says_why(args, text):
    found = run("--port", "0", *args)
    assert found.returncode == 2, found.stderr
    assert text in found.stderr
    assert "Traceback" not in found.stderr


def test_an_idle_server_uses_no_time():
    """Whoever polls does so in every second; what a busy machine happens to charge us for is in some of them only."""
    with ServerProcess() as server:
        pids = [server.process.pid, server.engine_pid()]
        server.client.get("/ready")
        before = [ticks(pid) for pid in pids]
        response, lines = begin(server, LONG | {"max_tokens": 200})  # something that takes its time, for comparison
        rest(lines)
        response.close()
        busy = [ticks(pid) - b for pid, b in zip(pids, before, strict=True)]
        seconds = []
        for _ in range(10):
            before = [ticks(pid) for pid in pids]
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(1.0)
            seconds.append([ticks(pid) - b for pid, b in zip(pids, before, strict=True)])
            if seconds[-1][0] <= 1 and seconds[-1][1] == 0:
                return
        pytest.fail(f"server and engine used {seconds} ticks in idle seconds, {busy} in an answer")


def ticks(pid):
    """Clock ticks of processor time that a process has used."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])
