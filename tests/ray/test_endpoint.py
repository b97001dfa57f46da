"""What the endpoint makes of a replica's answers and deaths, with replicas that are scripts."""

import asyncio
import json

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from evenflow.engine.client import EngineDeadError
from evenflow.ray.endpoint import EndpointApp
from evenflow.server.config import ServerConfig

START = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]}
WHOLE = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]}
DONE = b"data: [DONE]\n\n"


def body(data, more=True):
    return {"type": "http.response.body", "body": data, "more_body": more}


class Engines:
    """A handle whose replicas answer by scripts, one for each try: lists of messages, then perhaps an error."""

    def __init__(self, *scripts):
        self.scripts, self.tried, self.cancelled = list(scripts), [], 0

    def options(self, **_):
        return self

    def remote(self, *args, **kwargs):
        self.tried.append("routed" if args else "free")
        return Answer(self, self.scripts.pop(0))


class Answer:
    def __init__(self, engines, script):
        self.engines, self.script = engines, list(script)

    def __aiter__(self):
        return self

    async def __anext__(self):
        if not self.script:
            raise StopAsyncIteration
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        if step == "hang":
            await asyncio.Event().wait()
        return [dict(message) for message in step]

    def cancel(self):
        self.engines.cancelled += 1


def ask(engines, method="POST", path="/v1/completions", is_leaving=False, prefix_aware=True):
    """The messages that a client is sent."""
    received = [{"type": "http.request", "body": b'{"prompt": "a"}', "more_body": False}]
    sent = []

    async def receive():
        if not received:
            if not is_leaving:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}
        return received.pop()

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": [], "client": None}
    asyncio.run(EndpointApp(engines, ServerConfig(), prefix_aware)(scope, receive, send))
    return sent


def text(sent):
    return b"".join(message.get("body", b"") for message in sent)


RIGHT = [[WHOLE, body(b"{}", False)]]


@pytest.mark.parametrize("error", [ActorDiedError(), EngineDeadError("gone")])
def test_a_request_that_has_not_begun_moves_on(error):
    engines = Engines([error], [error], RIGHT)
    sent = ask(engines)
    assert (sent[0]["status"], text(sent)) == (200, b"{}")
    assert engines.tried == ["routed", "free", "free"]  # a router that still believes in the dead is not asked again
    assert engines.cancelled == 3


def test_it_gives_up_with_503():
    sent = ask(Engines(*[[ActorDiedError()]] * 3))
    assert sent[0]["status"] == 503
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert json.loads(text(sent))["error"]["type"] == "overloaded_error"


def test_a_stream_that_has_begun_ends_with_an_error():
    sent = ask(Engines([[START, body(b"data: 1\n\n")], ActorDiedError()], RIGHT))
    events = text(sent).split(b"\n\n")
    assert events[0] == b"data: 1"
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["type"] == "overloaded_error"
    assert events[2:] == [b"data: [DONE]", b""]
    assert not sent[-1]["more_body"]


def test_a_stream_ends_once():
    sent = ask(Engines([[START, body(b"data: 1\n\n")], [body(DONE)], ActorDiedError()]))
    assert text(sent) == b"data: 1\n\n" + DONE
    assert not sent[-1]["more_body"]


def test_another_answer_that_has_begun_is_cut():
    with pytest.raises(ConnectionError):
        ask(Engines([[WHOLE, body(b"{")], ActorDiedError()]))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), 429),
        (DeploymentUnavailableError("Engine"), 503),
        (RuntimeError("a secret"), 500),
    ],
)
def test_other_errors_are_told_and_not_tried_again(error, status):
    engines = Engines([error])
    sent = ask(engines)
    assert sent[0]["status"] == status
    assert b"secret" not in text(sent)
    assert len(engines.tried) == 1


def test_without_prefixes_nothing_is_routed():
    engines = Engines(RIGHT)
    ask(engines, prefix_aware=False)
    assert engines.tried == ["free"]


def test_a_client_that_leaves_cancels_its_answer():
    engines = Engines([[START, body(b"data: 1\n\n")], "hang"])
    ask(engines, is_leaving=True)
    assert engines.cancelled == 1


def test_a_get_that_finds_no_replica_is_not_tried_again():
    engines = Engines([ActorDiedError()])
    assert ask(engines, "GET", "/v1/models")[0]["status"] == 503
