"""What serving costs over the engine alone, and what the server holds: the demo model over HTTP on this machine.

python benchmarks/serving.py                     # all of it, about ten minutes
python benchmarks/serving.py --parts throughput  # served over offline tokens/s at 64 streams, by turns

The client is this process, on the same cores as the server: a real client has its own.
"""

import argparse
import asyncio
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import uvloop
from workload import lengths, prompts

RESULTS = Path(__file__).parent / "results" / "serving.json"
CONTEXT, VOCAB = 1024, 3072
TICKS_PER_S = 100
PARTS = ("throughput", "streams", "memory")
OFFLINE = """
import json, sys, time
from evenflow import LLM, SamplingParams
requests, num_streams = json.loads(sys.stdin.read())
llm = LLM("demo", max_num_seqs=num_streams)
params = [SamplingParams(max_tokens=n, ignore_eos=True, seed=i) for i, (_, n) in enumerate(requests)]
llm.generate([[5]], SamplingParams(max_tokens=4))
start = time.perf_counter()
outputs = llm.generate([ids for ids, _ in requests], params, use_tqdm=False)
print(sum(len(o.outputs[0].token_ids) for o in outputs) / (time.perf_counter() - start))
"""


class Server:
    """`evenflow serve` with its two processes."""

    def __init__(self, *args: str) -> None:
        command = [sys.executable, "-m", "evenflow", "serve", "--port", "0", "--no-access-log", *args]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = next(line for line in self.process.stderr if "ready:" in line)
        self.port = int(line.partition("127.0.0.1:")[2].split()[0])
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        self.engine_pid = next(int(pid) for pid in children if "engine" in Path(f"/proc/{pid}/cmdline").read_text())

    def cpu_s(self, pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def rss_mb(self, pid: int) -> float:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 1e6

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


@contextlib.contextmanager
def serving(*args: str) -> Iterator[Server]:
    server = Server(*args)
    try:
        yield server
    finally:
        server.close()


class Exchange(asyncio.Protocol):
    """One request on a connection of its own; counts the events of its answer, and looks at nothing else."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.status = self.num_events = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self.status:
            self.status = int(data.split(b" ", 2)[1])
        self.num_events += (self._tail + data).count(b"data: ")
        self._tail = data[-5:]

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_result(None)


async def post(port: int, body: dict, chunk_bytes: int = 0) -> tuple[int, int]:
    """(status, number of events) of one request. chunk_bytes: of a chunked body."""
    data = json.dumps(body).encode()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
    )
    if chunk_bytes:
        parts = (data[i : i + chunk_bytes] for i in range(0, len(data), chunk_bytes))
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
        request = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    else:
        request = head + b"Content-Length: %d\r\n\r\n" % len(data) + data
    loop = asyncio.get_running_loop()
    _, exchange = await loop.create_connection(lambda: Exchange(request), "127.0.0.1", port)
    await exchange.ended
    return exchange.status, exchange.num_events


async def run_streams(port: int, requests: list[tuple[list[int], int]], num_streams: int) -> list[tuple[int, int]]:
    """All requests, num_streams at a time."""
    waiting = list(enumerate(requests))[::-1]
    results: list[tuple[int, int]] = []

    async def work() -> None:
        while waiting:
            index, (ids, num_output) = waiting.pop()
            body = {"prompt": ids, "max_tokens": num_output, "ignore_eos": True, "seed": index, "stream": True}
            results.append(await post(port, body))

    await asyncio.gather(*(work() for _ in range(num_streams)))
    return results


def make_requests(count: int) -> list[tuple[list[int], int]]:
    found = lengths(count, CONTEXT)
    return list(zip(prompts(found, VOCAB), (num_output for _, num_output in found), strict=True))


def throughput(num_requests: int, num_streams: int, num_rounds: int) -> dict:
    """Offline and served by turns."""
    requests = make_requests(num_requests)
    num_tokens = sum(num_output for _, num_output in requests)
    rounds = []
    for number in range(num_rounds):
        offline = subprocess.run(
            [sys.executable, "-c", OFFLINE],
            input=json.dumps([requests, num_streams]),
            capture_output=True,
            text=True,
            check=True,
        )
        with serving("--max-num-seqs", str(num_streams)) as server:
            uvloop.run(post(server.port, {"prompt": [5], "max_tokens": 4}))
            pids = server.process.pid, server.engine_pid
            before = [server.cpu_s(pid) for pid in pids]
            start = time.perf_counter()
            results = uvloop.run(run_streams(server.port, requests, num_streams))
            elapsed_s = time.perf_counter() - start
            front_s, engine_s = (server.cpu_s(pid) - b for pid, b in zip(pids, before, strict=True))
        assert all(status == 200 for status, _ in results)
        found = {
            "offline_tokens_per_s": float(offline.stdout),
            "served_tokens_per_s": num_tokens / elapsed_s,
            "front_cpu_us_per_token": 1e6 * front_s / num_tokens,
            "engine_cpu_us_per_token": 1e6 * engine_s / num_tokens,
            "events_per_token": sum(events for _, events in results) / num_tokens,
        }
        rounds.append(found)
        ratio = found["served_tokens_per_s"] / found["offline_tokens_per_s"]
        print(f"round {number}: served/offline {ratio:.2f}  " + "  ".join(f"{k} {v:,.1f}" for k, v in found.items()))
    ratio = statistics.median(r["served_tokens_per_s"] / r["offline_tokens_per_s"] for r in rounds)
    return {"requests": num_requests, "streams": num_streams, "rounds": rounds, "served_over_offline": ratio}


def streams(num_streams: int) -> dict:
    """So many streams open at once, none fails."""
    requests = [([5 + i % 1000, 17], 40) for i in range(num_streams)]
    with serving() as server:
        start = time.perf_counter()
        results = uvloop.run(run_streams(server.port, requests, num_streams))
        elapsed_s = time.perf_counter() - start
    num_ok = sum(status == 200 for status, _ in results)
    print(f"{num_streams} open streams: {num_ok} answered, {num_streams * 40 / elapsed_s:,.0f} tokens/s")
    return {"streams": num_streams, "answered": num_ok, "seconds": elapsed_s}


def memory(num_requests: int, num_chunks: int) -> dict:
    """Resident memory of both processes over many requests, and over a body of one-byte chunks."""
    requests = [([5 + i % 3000, 17], 2) for i in range(num_requests)]
    with serving() as server:
        pids = server.process.pid, server.engine_pid
        uvloop.run(run_streams(server.port, requests[: num_requests // 10], 64))
        samples = [[server.rss_mb(pid) for pid in pids]]
        for tenth in range(1, 10):
            part = requests[tenth * num_requests // 10 : (tenth + 1) * num_requests // 10]
            results = uvloop.run(run_streams(server.port, part, 64))
            assert all(status == 200 for status, _ in results)
            samples.append([server.rss_mb(pid) for pid in pids])
        before = server.rss_mb(server.process.pid)
        body = {"prompt": "a", "max_tokens": 1, "ignored": "x" * (num_chunks - 60)}
        status, _ = uvloop.run(post(server.port, body, chunk_bytes=1))
        after = server.rss_mb(server.process.pid)
    front, engine = zip(*samples, strict=True)
    for name, found in (("front", front), ("engine", engine)):
        print(f"{num_requests} requests: {name} {found[0]:.1f} -> {found[-1]:.1f} MB")
    print(f"{num_chunks} one-byte chunks: status {status}, front {before:.1f} -> {after:.1f} MB")
    return {"front_mb": front, "engine_mb": engine, "chunks_status": status, "chunks_mb": [before, after]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    record = json.loads(args.output.read_text()) if args.output.exists() else {}
    if "throughput" in args.parts:
        record["throughput"] = throughput(args.requests, args.streams, args.rounds)
    if "streams" in args.parts:
        record["streams"] = streams(1000)
    if "memory" in args.parts:
        record["memory"] = memory(10_000, 64 * 1024)
    record["python"], record["machine"] = platform.python_version(), platform.machine()
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
