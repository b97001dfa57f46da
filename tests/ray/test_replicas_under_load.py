"""`evenflow serve --replicas 2` with real Ray: one endpoint, and what becomes of requests when a replica dies."""

import json
import os
import re
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import ServerProcess, is_alive

from evenflow import LLM, SamplingParams

DEADLINE_S = 120
REPLICA = re.compile(r"replica (\w+) is ready in process (\d+)")
PROMPTS = [
    f"{start} {number}" for number in range(8) for start in ("Once upon a time", "The fox", "A wolf", "There was")
]
NUM_TOKENS = 96


@pytest.fixture(scope="module")
def server():
    with ServerProcess("--replicas", "2", "--cpus-per-replica", "0.5", "--max-num-seqs", "64") as process:
        yield process


@pytest.fixture(scope="module")
def expected():
    """The greedy text of every prompt, from an engine that has no server."""
    outputs = LLM("demo").generate(PROMPTS, SamplingParams(temperature=0, max_tokens=NUM_TOKENS))
    return {prompt: output.outputs[0].text for prompt, output in zip(PROMPTS, outputs, strict=True)}


def samples(server, name):
    """A metric's value by replica."""
    response = server.client.get("/metrics")
    assert response.status_code in (200, 503), response.text
    if response.status_code == 503:  # no replica is up
        return {}
    families = text_string_to_metric_families(response.text)
    return {s.labels["replica"]: s.value for family in families for s in family.samples if s.name == name}


def poll(ask, what):
    """Asks until the answer is true. Each question takes an answer of the server's, so this does not spin."""
    deadline = time.monotonic() + DEADLINE_S
    while time.monotonic() < deadline:
        if answer := ask():
            return answer
    raise AssertionError(f"{what} did not come true in {DEADLINE_S} s")


def pids(server):
    """The process of each replica that has said it is ready."""
    return {match[1]: int(match[2]) for line in list(server.lines) if (match := REPLICA.search(line))}


def two_replicas(server, other_than=None):
    """Both replicas, by name, once they answer and their processes are known."""

    def both():
        found = samples(server, "evenflow_num_requests_running").keys()
        return found if len(found) == 2 and other_than not in found and found <= pids(server).keys() else None

    try:
        return poll(both, "two replicas")
    except AssertionError:
        print(*server.lines, sep="\n")
        raise


@dataclass
class Outcome:
    prompt: str
    is_streamed: bool
    status: int
    text: str
    error: dict | None


def body_of(prompt, is_streamed):
    return {"prompt": prompt, "max_tokens": NUM_TOKENS, "temperature": 0, "stream": is_streamed}


def ask_whole(client, prompt):
    response = client.post("/v1/completions", json=body_of(prompt, False))
    answer = response.json()
    text = answer["choices"][0]["text"] if response.status_code == 200 else ""
    return Outcome(prompt, False, response.status_code, text, answer.get("error"))


def ask_streamed(client, prompt, begun):
    text, error, lines = "", None, []
    with client.stream("POST", "/v1/completions", json=body_of(prompt, True)) as response:
        if response.status_code != 200:
            return Outcome(prompt, True, response.status_code, "", json.loads(response.read())["error"])
        for line in response.iter_lines():
            begun.release()
            lines.append(line.removeprefix("data: ")) if line else None
    assert lines[-1] == "[DONE]"
    for event in map(json.loads, lines[:-1]):
        error = event.get("error", error)
        text += event["choices"][0]["text"] if "choices" in event else ""
    return Outcome(prompt, True, 200, text, error)


def check(outcome, expected):
    """Right, or failed in a way that a client can see and try again."""
    if outcome.status == 200 and outcome.error is None:
        assert outcome.text == expected[outcome.prompt]
        return
    assert outcome.error["type"] == "overloaded_error", outcome
    assert outcome.status == (200 if outcome.text else 503), outcome
    assert expected[outcome.prompt].startswith(outcome.text.rstrip("\ufffd")), outcome


def under_load(server, expected, strike):
    """All prompts, streamed and whole, at once; strike() when some streams have begun. Returns what became of each."""
    begun = threading.Semaphore(0)
    limits = httpx.Limits(max_connections=100)
    with (
        httpx.Client(base_url=server.url, timeout=DEADLINE_S, limits=limits) as client,
        ThreadPoolExecutor(2 * len(PROMPTS)) as threads,
    ):
        asked = [threads.submit(ask_streamed, client, prompt, begun) for prompt in PROMPTS]
        asked += [threads.submit(ask_whole, client, prompt) for prompt in PROMPTS]
        for _ in PROMPTS:
            assert begun.acquire(timeout=DEADLINE_S)
        strike()
        outcomes = [future.result(DEADLINE_S) for future in asked]
    for outcome in outcomes:
        check(outcome, expected)
    return outcomes


def busiest(server):
    running = poll(
        lambda: {name: n for name, n in samples(server, "evenflow_num_requests_running").items() if n}, "a busy replica"
    )
    return max(running, key=running.get)


def test_the_endpoint_answers_as_a_server_does(server, expected):
    two_replicas(server)
    prompt = PROMPTS[0]
    assert ask_whole(server.client, prompt).text == expected[prompt]
    assert ask_streamed(server.client, prompt, threading.Semaphore(0)).text == expected[prompt]
    refused = server.client.post("/v1/completions", json={"prompt": prompt, "temperature": -1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert server.client.get("/nothing").status_code == 404
    assert server.client.put("/v1/completions").status_code == 405
    assert server.client.get("/ready").json() == {"status": "ready"}
    assert server.client.get("/").headers["content-type"].startswith("text/html")
    answer = server.client.get("/health", headers={"X-Request-Id": "mine"})
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_prompts_that_begin_alike_go_to_the_same_replica(server):
    two_replicas(server)
    before = samples(server, "evenflow_request_success_total")
    tale = "The hare and the tortoise ran a race that all the animals of the wood had come to see. " * 4
    cached = 0
    for number in range(6):
        body = {"prompt": f"{tale}{number}", "max_tokens": 1}
        cached = server.client.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"][
            "cached_tokens"
        ]
        assert bool(cached) == (number > 0)
    after = samples(server, "evenflow_request_success_total")
    assert sorted(after[name] - before[name] for name in after) == [0, 6]


def test_a_killed_replica_loses_no_request(server, expected):
    two_replicas(server)
    killed = []

    def strike():
        killed.append(busiest(server))
        os.kill(pids(server)[killed[0]], signal.SIGKILL)

    outcomes = under_load(server, expected, strike)
    whole = [outcome for outcome in outcomes if not outcome.is_streamed]
    assert all(outcome.status == 200 for outcome in whole)  # none had begun to answer, so all could be asked again
    assert any(outcome.error for outcome in outcomes)  # streams that had begun: the kill came in time
    both = two_replicas(server, other_than=killed[0])

    def have_served():
        with ThreadPoolExecutor(len(PROMPTS)) as threads:
            list(threads.map(lambda prompt: check(ask_whole(server.client, prompt), expected), PROMPTS))
        counts = samples(server, "evenflow_generation_tokens_total")
        return all(counts.get(name) for name in both)

    poll(have_served, "that both replicas have served")


def test_a_replica_whose_engine_dies_is_replaced(server, expected):
    two_replicas(server)
    killed = []

    def strike():
        killed.append(busiest(server))
        pid = pids(server)[killed[0]]
        children = {p for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()}
        (engine,) = [int(p) for p in children if b"evenflow.engine" in Path(f"/proc/{p}/cmdline").read_bytes()]
        os.kill(engine, signal.SIGKILL)

    outcomes = under_load(server, expected, strike)
    assert all(outcome.status == 200 for outcome in outcomes if not outcome.is_streamed)
    two_replicas(server, other_than=killed[0])
    poll(lambda: not is_alive(pids(server)[killed[0]]), "the end of the replica")


def test_a_client_that_leaves_ends_its_generation(server):
    two_replicas(server)
    before = sum(samples(server, "evenflow_request_success_total").values())
    body = {"prompt": "A wolf", "max_tokens": 900, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    poll(lambda: not any(samples(server, "evenflow_num_requests_running").values()), "an idle engine")
    assert sum(samples(server, "evenflow_request_success_total").values()) == before
