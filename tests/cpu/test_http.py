"""The bounds of the HTTP protocol, over raw sockets to a real uvicorn: what is too large, too slow, or no HTTP."""

import asyncio
import json
import socket
import threading

import pytest
import uvicorn

from evenflow.server.body import decode, read_json_body
from evenflow.server.errors import ApiError, error_response
from evenflow.server.protocol import CompletionRequest
from evenflow.server.protocol_bounds import MAX_HEADERS, Bounds, bounded
from evenflow.server.serving import Server

MAX_BODY = 100_000


async def app(scope, receive, send):
    """POST answers with the length of the body's prompt; GET /big with 20 MB."""
    try:
        if scope["path"] == "/big":
            body = b"x" * 20_000_000
        else:
            request, size = await read_json_body(scope, receive, CompletionRequest, MAX_BODY)
            body = json.dumps([len(request.prompt), size]).encode()
    except ApiError as error:
        await error_response(error)(scope, receive, send)
        return
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Listening:
    """The app behind uvicorn, in a thread."""

    def __init__(self, bounds: Bounds) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.address = self.socket.getsockname()
        config = uvicorn.Config(
            app, http=bounded(bounds), ws="none", lifespan="off", log_config=None, timeout_keep_alive=60
        )
        self.server = Server(config)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.socket])))
        self.thread.start()

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join()

    def ask(self, *parts: bytes) -> bytes:
        """Send, and read until the server closes."""
        with socket.create_connection(self.address) as connection:
            connection.settimeout(30)
            try:
                for part in parts:
                    connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                pass  # it has heard enough
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return data


@pytest.fixture(scope="module")
def patient():
    listening = Listening(Bounds(receive_s=60, write_s=60))
    yield listening
    listening.close()


@pytest.fixture(scope="module")
def hasty():
    listening = Listening(Bounds(receive_s=0.5, write_s=0.5))
    yield listening
    listening.close()


def head(*lines: str, close: bool = True) -> bytes:
    lines = ("POST / HTTP/1.1", "Host: localhost", *lines, *(["Connection: close"] if close else []))
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict:
    """The error of an answer: JSON as all of ours."""
    assert b"content-type: application/json" in answer.lower()
    found = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


BODY = b'{"prompt": "abc"}'


def test_an_honest_request_is_answered(patient):
    answer = patient.ask(head(f"Content-Length: {len(BODY)}"), BODY)
    assert status(answer) == 200
    assert answer.endswith(b"[3, 17]")


def test_a_body_of_one_byte_chunks_is_read(patient):
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY)
    answer = patient.ask(head("Transfer-Encoding: chunked"), chunks + b"0\r\n\r\n")
    assert answer.endswith(b"[3, 17]")


def test_requests_on_one_connection_are_answered_in_order(patient):
    one = head(f"Content-Length: {len(BODY)}", close=False) + BODY
    last = head("Content-Length: 16") + b'{"prompt": "ab"}'
    answer = patient.ask(one * 20 + last)
    assert answer.count(b"[3, 17]") == 20
    assert answer.endswith(b"[2, 16]")


TOO_LARGE = [
    (b"POST / HTTP/1.1\r\nX: " + b"a" * 200_000, 431),  # a field that never ends
    (b"POST / HTTP/1.1\r\n" + b"".join(b"X%d: a\r\n" % i for i in range(MAX_HEADERS + 2)), 431),
    (b"POST / HTTP/1.1\r\n" + b"X: a\r\n" * 5000, 431),
    (b"POST /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n", 414),
    (b"POST / HTTP/1.1\r\n" + b"".join(b"X%d: %s\r\n" % (i, b"a" * 7000) for i in range(20)), 431),
]


@pytest.mark.parametrize(("data", "code"), TOO_LARGE)
def test_a_head_is_bounded_while_it_arrives(patient, data, code):
    answer = patient.ask(data)
    assert status(answer) == code
    assert error(answer)["type"] == "invalid_request_error"


def test_a_body_is_bounded_before_it_arrives(patient):
    answer = patient.ask(head(f"Content-Length: {MAX_BODY + 1}"))
    assert status(answer) == 413
    assert b"connection: close" in answer.lower()


def test_a_chunked_body_is_bounded_while_it_arrives(patient):
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    assert status(patient.ask(head("Transfer-Encoding: chunked"), *[chunk] * 40)) == 413


NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"GARBAGE\r\n\r\n",
    head("Content-Length: 5", "Transfer-Encoding: chunked") + b"0\r\n\r\n",  # request smuggling
    head("Content-Length: 5", "Content-Length: 6") + BODY,
    head("Content-Length: -1"),
    head("Transfer-Encoding: chunked") + b"zz\r\n",
    b"POST / HTTP/1.1\r\nHost : a\r\n\r\n",
    b"POST / HTTP/1.1\r\n X: a\r\n\r\n",
    b"CONNECT evil:443 HTTP/1.1\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",  # no Host
    b"POST / HTTP/1.1\r\nHost: a\r\nHost: b\r\nContent-Length: 0\r\n\r\n",
    head("Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    head("Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\nAuthorization: Bearer stolen\r\n\r\n",  # a trailer
]


def test_a_trailer_that_never_ends_is_cut_off(patient):
    begin = head("Transfer-Encoding: chunked") + b"1\r\n{\r\n0\r\nX: "
    assert status(patient.ask(begin, *[b"a" * 100_000] * 10)) == 431


def test_an_upgrade_whose_head_comes_in_parts_is_refused_not_answered_without_its_body(patient):
    data = head("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(BODY)}", close=False) + BODY
    at = data.index(b"pgrade: h2c")
    with socket.create_connection(patient.address) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(data[:at])
        before = len(patient.server.server_state.connections)
        while not before:  # until the first part has been read
            before = len(patient.server.server_state.connections)
        while not any(p.headers for p in patient.server.server_state.connections):
            pass
        connection.sendall(data[at:])
        answer = read_all(connection)
    assert status(answer) == 400
    assert "pgrade" in error(answer)["message"]


def test_pipelining_is_bounded(patient):
    one = head(f"Content-Length: {len(BODY)}", close=False) + BODY
    assert patient.ask(one * 1000).count(b"[3, 17]") < 100


@pytest.mark.parametrize("data", NO_HTTP)
def test_what_is_no_http_is_refused_as_json(patient, data):
    answer = patient.ask(data)
    assert status(answer) == 400
    assert "Traceback" not in error(answer)["message"]


def test_an_offer_to_upgrade_is_ignored(patient):
    """Some clients offer HTTP/2 with every request; its body must not be lost for that."""
    for kind in ("h2c", "websocket"):
        lines = ("Connection: Upgrade, HTTP2-Settings", f"UPGRADE: {kind}", f"Content-Length: {len(BODY)}")
        answer = patient.ask(head(*lines, close=False) + BODY, head("Content-Length: 16") + b'{"prompt": "ab"}')
        assert answer.count(b"HTTP/1.1 200") == 2, answer
        assert b"[3, 17]" in answer


@pytest.mark.parametrize(
    "data", [b"", b"POST /", head("Content-Length: 100") + b"{", head("Transfer-Encoding: chunked")]
)
def test_a_request_must_arrive_in_time(hasty, data):
    """Slow-loris: nothing, a part of the head, a part of the body. The server closes without being asked."""
    answer = hasty.ask(data)
    assert status(answer) == 408


def test_the_time_starts_anew_with_each_request(hasty):
    answer = hasty.ask(head(f"Content-Length: {len(BODY)}", close=False) + BODY + b"POST / HT")
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answer


def test_bytes_that_begin_no_request_keep_no_connection(hasty):
    with socket.create_connection(hasty.address) as connection:
        connection.settimeout(20)  # below uvicorn's own time for idle connections
        connection.sendall(head(f"Content-Length: {len(BODY)}", close=False) + BODY)
        answer = b""
        while not answer.endswith(b"[3, 17]"):
            answer += connection.recv(65536)
        connection.sendall(b"\r\n")
        assert status(read_all(connection)) == 408


def test_a_reader_that_reads_nothing_is_disconnected(hasty):
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(hasty.address)
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        while hasty.server.server_state.connections == set():
            pass
        while hasty.server.server_state.connections:  # until the server has given up
            pass
        assert len(read_all(connection)) < 20_000_000


def test_a_slow_reader_gets_everything(patient):
    with socket.create_connection(patient.address) as connection:
        connection.sendall(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert len(read_all(connection)) > 20_000_000


# Bodies


WRONG = [
    (b'{"prompt": "a", "n": "2"}', "n"),
    (b'{"prompt": "a", "n": 1.5}', "n"),
    (b'{"prompt": "a", "n": true}', "n"),
    (b'{"prompt": "a", "stop": [1]}', "stop"),
    (b'{"prompt": "a", "stream_options": {"include_usage": 1}}', "stream_options"),
    (b'{"prompt": "a", "logit_bias": {"1": "2"}}', "logit_bias"),
    (b'{"prompt": {"a": 1}}', "prompt"),
    (b'{"prompt": [[["a"]]]}', "prompt"),
    (b"{}", "prompt"),
    (b'{"prompt": "a", "temperature": 1e999}', "temperature"),
    (b'{"prompt": "a", "temperature": Infinity}', None),
    (b'{"prompt": "\\udc00"}', None),
    (b'{"prompt": "a"} x', None),
    (b"nul", None),
]


@pytest.mark.parametrize(("body", "param"), WRONG)
def test_a_wrong_field_is_named(body, param):
    with pytest.raises(ApiError) as caught:
        decode(body, CompletionRequest)
    assert (caught.value.status, caught.value.param) == (400, param), caught.value.message


def test_a_whole_number_may_be_written_as_a_float():
    body = decode(b'{"prompt": "a", "max_tokens": 4.0, "n": 2e0, "seed": -0.0, "temperature": 1}', CompletionRequest)
    assert (body.max_tokens, body.n, body.seed, body.temperature) == (4, 2, 0, 1.0)
    assert all(type(value) is int for value in (body.max_tokens, body.n, body.seed))
    assert decode(b'{"prompt": "a", "seed": 9007199254740991.0}', CompletionRequest).seed == 2**53 - 1
    assert decode(b'{"prompt": "a", "logprobs": 2.0}', CompletionRequest).logprobs == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"prompt": "a", "seed": 9007199254740992.0}', "seed"),
        (b'{"prompt": "a", "seed": -1e300}', "seed"),
        (b'{"prompt": "a", "n": 2.0, "max_tokens": 4.5}', "max_tokens"),
        (b'{"prompt": "a", "n": 2.0, "echo": 1.0}', "echo"),
        (b'{"prompt": "a", "n": 2.0, "best_of": "2"}', "best_of"),
        (b'{"prompt": "a", "n": 2.0, "top_k": 1e999}', None),
        (b'{"prompt": "a", "n": 2.0, "top_k": ', None),
        (b'{"prompt": "a", "n": 2.0, "user": "\xff"}', None),
        (b'{"prompt": "a", "n": 2.0, "user": "\\ud800"}', None),
        (b'{"prompt": "a", "n": 2.0, "guided_json": ' + b"[" * 100_000, None),
        (b"4.0", None),
        (b'{"prompt": "a", "n": 2.0, "suffix": "z"}', "suffix"),
        (b'{"n": 2.0}', "prompt"),
    ],
)
def test_other_numbers_are_still_refused(body, param):
    with pytest.raises(ApiError) as caught:
        decode(body, CompletionRequest)
    assert (caught.value.status, caught.value.param) == (400, param), caught.value.message


@pytest.mark.parametrize(("asked", "taken"), [(b"true", 1), (b"false", None), (b"0", 0), (b"null", None)])
def test_logprobs_of_a_completion_may_be_a_chats(asked, taken):
    logprobs = decode(b'{"prompt": "a", "logprobs": ' + asked + b"}", CompletionRequest).logprobs
    assert logprobs == taken
    assert not isinstance(logprobs, bool)


@pytest.mark.parametrize(
    "text",
    [
        rb"\ud800",
        rb"\uDC00",
        rb"\ud83d\ude00 \ud800",
        rb"a\ud800\u0041",
        rb"\\\udbff",
        rb"\ud800abcdefgh",
        rb"\udc00\ud800",
    ],
)
def test_half_of_a_surrogate_pair_is_called_that(text):
    with pytest.raises(ApiError, match=r"\\u[dD]\w{3} is half of a surrogate pair"):
        decode(b'{"prompt": "' + text + b'"}', CompletionRequest)


def test_other_broken_json_is_not_called_half_of_a_pair():
    assert decode(rb'{"prompt": "\ud83d\ude00 \\ud800"}', CompletionRequest).prompt == "\U0001f600 \\ud800"
    with pytest.raises(ApiError, match="truncated"):
        decode(rb'{"prompt": "\ud83d\ude00 \\ud800', CompletionRequest)


def test_depth_is_bounded_without_a_deep_stack():
    def nested(depth):
        return b'{"prompt": "a", "guided_json": ' + b'{"a":' * depth + b"1" + b"}" * (depth + 1)

    assert decode(nested(60), CompletionRequest).guided_json
    for depth in (65, 900, 100_000):
        with pytest.raises(ApiError, match="nested"):
            decode(nested(depth), CompletionRequest)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, 200),
        ({b"content-type": b"application/json"}, 200),
        ({b"content-type": b"application/json; charset=UTF-8"}, 200),
        ({b"content-type": b"application/vnd.api+json"}, 200),
        ({b"content-type": b"text/plain"}, 415),
        ({b"content-type": b"application/json; charset=latin-1"}, 415),
        ({b"content-type": b"application/x-www-form-urlencoded"}, 415),
        ({b"content-encoding": b"gzip"}, 415),
        ({b"content-encoding": b"identity"}, 200),
    ],
)
def test_content_types(headers, code):
    async def receive():
        return {"type": "http.request", "body": BODY, "more_body": False}

    reading = read_json_body({"headers": list(headers.items())}, receive, CompletionRequest, MAX_BODY)
    if code == 200:
        assert asyncio.run(reading)[0].prompt == "abc"
    else:
        with pytest.raises(ApiError) as caught:
            asyncio.run(reading)
        assert caught.value.status == code
