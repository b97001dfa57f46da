"""The client and the load, on a server in virtual time: every latency is known, and exact."""

import asyncio
import json

import httpx
import pytest
from servers import Stream, data, run_virtually, token_events

from evenflow.bench.client import Client, events
from evenflow.bench.serving import ServingOptions, result_of, send_all
from evenflow.bench.workload import BenchRequest, Workload

# What `vllm bench serve` writes, without --save-detailed; its other fields are None or of other backends.
VLLM_FIELDS = (
    "date endpoint_type backend label model_id tokenizer_id num_prompts request_rate burstiness max_concurrency "
    "duration completed failed total_input_tokens total_output_tokens request_throughput request_goodput "
    "output_throughput total_token_throughput max_output_tokens_per_s max_concurrent_requests "
    "mean_ttft_ms median_ttft_ms std_ttft_ms p99_ttft_ms mean_tpot_ms median_tpot_ms std_tpot_ms p99_tpot_ms "
    "mean_itl_ms median_itl_ms std_itl_ms p99_itl_ms mean_e2el_ms median_e2el_ms std_e2el_ms p99_e2el_ms"
).split()
VLLM_DETAILS = "input_lens output_lens ttfts itls start_times errors".split()


def ask(pieces, requests, times=None, status=200, max_concurrency=None, seen=None):
    """(records, seconds, most requests at a time) of requests to a server that sends `pieces` to each."""
    state = {"now": 0, "most": 0}

    async def answer(request):
        if seen is not None:
            seen.append(request)
        state["now"] += 1
        state["most"] = max(state["most"], state["now"])

        def at_end():
            state["now"] -= 1

        return httpx.Response(status, stream=Stream(pieces, at_end))

    async def work(loop):
        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as http:
            client = Client(http, "m", clock=loop.time)
            return await send_all(client, requests, times or [0.0] * len(requests), max_concurrency)

    records, seconds = run_virtually(work)
    return records, seconds, state["most"]


def timed_tokens(*gaps):
    """One token after each gap, usage and the end at once."""
    *chunks, usage, end = token_events(len(gaps), num_prompt_tokens=7)
    return [*zip(gaps, chunks, strict=True), (0.25, usage), (0.0, end)]


ONE = BenchRequest([1, 2, 3], 3, 3)


def test_latencies_are_what_the_server_made_them():
    [record], seconds, _ = ask(timed_tokens(1.0, 0.5, 2.0), [ONE])
    assert record.error == ""
    assert record.ttft_s == pytest.approx(1.0)
    assert record.itls_s == pytest.approx([0.5, 2.0])
    assert record.latency_s == pytest.approx(3.5)  # the usage chunk, 0.25 s later, is no token
    assert record.tpot_s == pytest.approx(1.25)
    assert (record.num_prompt_tokens, record.num_output_tokens) == (7, 3)  # as the server counts
    assert seconds == pytest.approx(3.75)


def test_the_body_is_that_of_openai():
    seen = []
    ask(timed_tokens(0.1), [ONE], seen=seen)
    body = json.loads(seen[0].content)
    assert body == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }


def test_pieces_may_be_cut_anywhere():
    whole = b"".join(token_events(4))
    for size in (1, 2, 7, 50, len(whole)):
        pieces = [(0.5, whole[i : i + size]) for i in range(0, len(whole), size)]
        [record], _, _ = ask(pieces, [ONE])
        assert (record.error, record.num_output_tokens, len(record.itls_s)) == ("", 4, 3)


def test_events_take_carriage_returns_and_comments():
    async def read(_):
        async def chunks():
            for part in (b": ping\r\nda", b"ta: {}\r\n", b"\r\nevent: x\ndata:[DONE]"):
                yield part

        return [event async for event in events(chunks())]

    assert run_virtually(read) == [b"{}", b"[DONE]"]


def test_requests_leave_when_they_are_due():
    times = [0.0, 2.0, 2.5, 10.0]  # a request lasts 2.25 s
    records, seconds, most = ask(timed_tokens(1.0, 1.0), [ONE] * 4, times)
    assert [record.start_s for record in records] == pytest.approx(times)
    assert [record.latency_s for record in records] == pytest.approx([2.0] * 4)
    assert seconds == pytest.approx(12.25)
    assert most == 2  # the first has its usage, and ends, at 2.25; the second leaves at 2


def test_no_more_than_max_concurrency_are_open_and_waiting_is_not_latency():
    records, seconds, most = ask(timed_tokens(1.0), [ONE] * 6, max_concurrency=2)
    assert most == 2
    assert seconds == pytest.approx(3 * 1.25)
    assert [record.start_s for record in records] == pytest.approx([0, 0, 1.25, 1.25, 2.5, 2.5])
    assert all(record.latency_s == pytest.approx(1.0) for record in records)
    assert ask(timed_tokens(1.0), [ONE] * 6)[2] == 6


@pytest.mark.parametrize(
    ("pieces", "status", "message"),
    [
        ([(0.0, b'{"error": {"message": "too long"}}')], 400, "HTTP 400: too long"),
        ([(0.0, b"<html>bad gateway")], 502, "HTTP 502: <html>bad gateway"),
        ([(0.1, data({"choices": [{"text": "x"}]}))], 200, "broke off before [DONE]"),
        ([(0.1, data("[DONE]"))], 200, "without a single chunk"),
        ([(0.1, data({"error": {"message": "engine died"}}))], 200, "the stream failed: engine died"),
        ([(0.1, data("{not json"))], 200, "the stream failed: {not json"),
    ],
)
def test_failures_are_told_and_never_raised(pieces, status, message):
    records, _, _ = ask(pieces, [ONE, ONE], status=status)
    assert [message in record.error for record in records] == [True, True]


def test_a_connection_that_breaks_is_a_failure_of_its_request():
    async def work(loop):
        def answer(request):
            raise httpx.ConnectError("refused")

        async with httpx.AsyncClient(transport=httpx.MockTransport(answer), base_url="http://x") as http:
            return await send_all(Client(http, "m", clock=loop.time), [ONE], [0.0], None)

    [record], _ = run_virtually(work)
    assert record.error == "ConnectError: refused"


def test_without_usage_chunks_are_counted():
    *chunks, _, end = token_events(3)
    [record], _, _ = ask([(0.1, piece) for piece in [*chunks, end]], [ONE])
    assert (record.num_prompt_tokens, record.num_output_tokens) == (3, 3)


def test_an_error_of_ours_ends_the_run_and_leaves_no_task():
    async def work(loop):
        class Broken:
            clock = staticmethod(loop.time)

            async def send(self, request, origin_s=0.0):
                raise RuntimeError("ours")

        with pytest.raises((RuntimeError, BaseException), match="ours|unhandled"):
            await send_all(Broken(), [ONE] * 3, [0.0] * 3, None)
        return len(asyncio.all_tasks())

    assert run_virtually(work) == 1


def test_the_fields_of_vllm_are_there_by_name():
    records, seconds, _ = ask(timed_tokens(1.0, 0.5), [ONE] * 2)
    workload = Workload("w", [ONE] * 2)
    result = result_of(workload, ServingOptions(has_details=True), "m", float("inf"), records, seconds)
    assert [name for name in VLLM_FIELDS + VLLM_DETAILS if name not in result] == []
    assert (result["request_rate"], result["num_prompts"], result["completed"]) == ("inf", 2, 2)
    assert result["mean_ttft_ms"] == pytest.approx(1000.0)
    assert "ttfts" not in result_of(workload, ServingOptions(), "m", 2.0, records, seconds)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("backend", "triton"),
        ("max_concurrency", 0),
        ("num_warmups", -1),
        ("request_rates", (0.0,)),
        ("percentiles", (101.0,)),
    ],
)
def test_options_are_refused_before_anything_is_sent(field, value):
    with pytest.raises(ValueError, match=str(value[0] if isinstance(value, tuple) else value).removesuffix(".0")):
        ServingOptions(**{field: value})
