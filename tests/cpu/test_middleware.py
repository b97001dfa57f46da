"""Who is let in, what is logged, and what a failure tells: each middleware by itself, around a small app."""

import asyncio
import hmac
import json
import logging
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evenflow.server.app import make_app
from evenflow.server.errors import ApiError, ClientDisconnected
from evenflow.server.middleware import LOOPBACK_NAMES, ApiKey, HostCheck, RequestLog, SecurityHeaders


async def hello(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def raising(error):
    async def app(scope, receive, send):
        raise error

    return app


class Answer:
    """What an app answers to one request."""

    def __init__(self, app, path="/v1/models", headers=(), method="GET"):
        self.messages = []

        async def send(message):
            self.messages.append(message)

        scope = {"type": "http", "path": path, "method": method, "state": {}, "client": ("127.0.0.1", 1)}
        scope["headers"] = [(k.lower().encode(), v if isinstance(v, bytes) else v.encode()) for k, v in headers]
        asyncio.run(app(scope, None, send))

    @property
    def status(self):
        return self.messages[0]["status"]

    @property
    def headers(self):
        return {k.decode(): v.decode() for k, v in self.messages[0]["headers"]}

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.messages[1:])

    @property
    def error(self):
        return json.loads(self.body)["error"]


def logged(app):
    return RequestLog(app, is_logging=True, on_error=lambda status: None)


# Keys


def keyed(*keys):
    return logged(ApiKey(hello, keys))


def bearer(key):
    return [("Authorization", f"Bearer {key}")]


def test_without_keys_the_server_is_open():
    assert Answer(keyed()).status == 200


@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/metrics", "/live", "/tokenize", "/nope", "/health/", "//health", "/ready/"]
)
def test_a_key_is_needed_on_every_path(path):
    app = keyed("one", "two")
    assert Answer(app, path).status == 401
    assert Answer(app, path, bearer("three")).status == 401
    assert Answer(app, path, bearer("one")).status == 200
    assert Answer(app, path, bearer("two")).status == 200


@pytest.mark.parametrize(("account", "expected"), [("", {}), ("kernels: right", {"kernels": "kernels: right"})])
def test_health_tells_of_the_kernels_where_there_are_any(account, expected):
    app = make_app(SimpleNamespace(client=SimpleNamespace(kernel_account=account)))
    assert json.loads(Answer(app, "/health").body) == {"status": "alive"} | expected


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_a_probe_needs_none(path):
    assert Answer(keyed("one"), path).status == 200


def test_the_host_header_opens_nothing():
    assert Answer(keyed("one"), "/v1/models", [("Host", "localhost/health")]).status == 401


def test_a_browser_is_asked_for_a_password():
    answer = Answer(keyed("se:cret"), "/", [("Accept", "text/html")])
    assert answer.headers["www-authenticate"].startswith("Basic ")
    assert answer.error["code"] == "invalid_api_key"
    assert Answer(keyed("se:cret"), "/", [("Authorization", "Basic YW55Om5v")]).status == 401  # any:no
    assert Answer(keyed("se:cret"), "/", [("Authorization", "Basic YW55OnNlOmNyZXQ=")]).status == 200  # any:se:cret
    assert Answer(keyed("one")).headers["www-authenticate"] == "Bearer"


def test_keys_are_compared_in_constant_time(monkeypatch):
    """Every key is compared, all of the same length, whatever was sent."""
    compared = []

    def compare(a, b):
        compared.append((len(a), len(b)))
        return a == b

    monkeypatch.setattr(hmac, "compare_digest", compare)
    for sent in ("one", "", "a" * 10_000, "two"):
        compared.clear()
        Answer(keyed("one", "two", "three"), headers=bearer(sent))
        assert compared == [(32, 32)] * 3


@given(st.binary(max_size=40))
def test_whatever_is_sent_is_no_key(value):
    if value.split() != [b"Bearer", b"one"]:
        assert Answer(keyed("one"), headers=[("Authorization", value)]).status == 401


def test_a_key_may_be_any_text():
    assert Answer(keyed("schlüssel 🗝"), headers=[("Authorization", "Bearer schlüssel 🗝".encode())]).status == 200


# Hosts


def local(names=LOOPBACK_NAMES):
    return logged(HostCheck(hello, names))


@pytest.mark.parametrize("host", ["localhost", "localhost:8000", "127.0.0.1:80", "[::1]:8000", "[::1]", "LOCALHOST"])
def test_our_own_names_pass(host):
    assert Answer(local(), headers=[("Host", host)]).status == 200
    assert Answer(local(), headers=[("Host", host), ("Origin", f"http://{host}")]).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Host", "")],
        [("Host", "evil.example")],
        [("Host", "localhost.evil.example:8000")],
        [("Host", "127.0.0.1.evil.example")],
        [("Host", "localhost@evil.example")],
        [("Host", "localhost:8000x")],
        [("Host", "localhost"), ("Host", "evil.example")],
        [("Host", "localhost"), ("Origin", "http://evil.example")],
        [("Host", "localhost"), ("Origin", "null")],
        [("Host", "localhost"), ("Origin", "http://localhost@evil.example")],
        [("Host", "localhost"), ("Origin", "http://[evil")],
    ],
)
def test_other_sites_do_not(headers):
    answer = Answer(local(), headers=headers)
    assert answer.status == 403
    assert answer.error["type"] == "permission_error"


def test_named_hosts_pass():
    assert Answer(local([*LOOPBACK_NAMES, "box.lan"]), headers=[("Host", "box.lan:8000")]).status == 200


def test_a_public_server_answers_to_any_name_but_not_to_another_sites_page():
    assert Answer(local(None), headers=[("Host", "a.example")]).status == 200
    assert Answer(local(None), headers=[("Host", "a.example"), ("Origin", "https://a.example")]).status == 200
    assert Answer(local(None), headers=[("Host", "a.example"), ("Origin", "https://b.example")]).status == 403


# Ids, logs, failures


def test_an_id_is_taken_over_if_it_is_harmless():
    assert Answer(logged(hello), headers=[("X-Request-Id", "my-id.1")]).headers["x-request-id"] == "my-id.1"
    for bad in ("a b", "", "x" * 129, "a\tb", "é"):
        found = Answer(logged(hello), headers=[("X-Request-Id", bad)]).headers["x-request-id"]
        assert len(found) == 32
        assert found != bad


def test_a_failure_tells_nothing_but_its_id(caplog):
    statuses = []
    app = RequestLog(raising(RuntimeError("/secret/path 0x7f")), is_logging=True, on_error=statuses.append)
    answer = Answer(app, headers=[("X-Request-Id", "abc")])
    assert answer.status == 500
    assert "abc" in answer.error["message"]
    assert "secret" not in answer.body.decode()
    assert "/secret/path" in caplog.text  # for the operator
    assert statuses == [500]


def test_an_api_error_is_told_as_it_is():
    answer = Answer(logged(raising(ApiError(429, "full", headers={"Retry-After": "1"}))))
    assert (answer.status, answer.error["type"], answer.headers["retry-after"]) == (429, "rate_limit_error", "1")


def test_a_failure_after_the_start_cuts_the_answer_off():
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    with pytest.raises(ConnectionError):
        Answer(logged(app))


def test_the_access_log_is_one_line_that_no_client_writes(caplog):
    caplog.set_level(logging.INFO)
    Answer(logged(hello), '/a\n127.0.0.1 "GET /fake" 200\x1b[31m', [("Authorization", "Bearer hidden")])
    (record,) = [record for record in caplog.records if record.name == "evenflow.access"]
    message = record.getMessage()
    assert "\n" not in message
    assert "\x1b" not in message
    assert "hidden" not in message
    assert record.fields["status"] == 200
    assert record.fields["bytes"] == 5


def test_a_client_that_left_is_logged_as_499(caplog):
    caplog.set_level(logging.INFO)
    assert Answer(logged(raising(ClientDisconnected()))).messages == []
    assert caplog.records[-1].fields["status"] == 499


def test_polling_is_not_logged_unless_it_fails(caplog):
    caplog.set_level(logging.INFO)
    Answer(logged(hello), "/health")
    assert caplog.records == []
    Answer(logged(raising(ApiError(401, "no"))), "/metrics")
    assert len(caplog.records) == 1


def test_security_headers_are_on_every_answer():
    headers = Answer(SecurityHeaders(hello)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "script-src 'self'" in headers["content-security-policy"]
    assert "unsafe" not in headers["content-security-policy"]
