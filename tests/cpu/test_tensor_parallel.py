"""Several ranks over gloo give what one gives, and end together, with one cause, when one of them fails."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import deque
from pathlib import Path

import pytest
import ranks
import torch
from checkpoints import make_checkpoint
from serving import ServerProcess, is_alive

from evenflow import LLM, EngineConfig, SamplingParams, StructuredOutputsParams
from evenflow.config import resolve
from evenflow.distributed import TensorParallel, join, listen, local_view
from evenflow.engine.client import EngineClient, EngineDeadError
from evenflow.engine.opening import open_model, resolve_settings
from evenflow.engine.rank_error import RankError
from evenflow.engine.ranks import Deadlines
from evenflow.engine.tensor_parallel import TensorParallelRunner
from evenflow.model_config import ModelConfig
from evenflow.platforms import Platform, cpu
from evenflow.request import AdmittedRequest, ScheduledRow, StepPlan

ONCE = "Once upon a time"
CASES = {
    "llama": {},
    "llama-mha": {},
    "llama-mqa": {},
    "llama-tied": {"vocab_size": 161},  # no multiple of the ranks
    "llama-biases": {"vocab_size": 163},
    "llama-head-dim": {},
    "mistral-window": {},
    "qwen2-window": {},
    "qwen3": {},
    "qwen3-bias": {},
}


@pytest.fixture(scope="module", autouse=True)
def nothing_stays():
    """No process, and nothing in shared memory."""
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    yield
    assert (set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()) <= before
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children")
    pids = children.read_text().split() if children.exists() else []
    assert [pid for pid in pids if b"evenflow.engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()] == []


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each of CASES the directory, and what one rank generates."""
    found = {}
    for name, changes in CASES.items():
        directory = make_checkpoint(tmp_path_factory.mktemp(name), name, num_hidden_layers=2, **changes).directory
        found[name] = (directory, ranks.generate(directory))
    return found


def free_address() -> str:
    listener, address = listen("tcp://127.0.0.1:0")
    listener.close()
    return address


def outputs(processes) -> list[tuple[int, str]]:
    """Exit code and last line of standard output of each."""
    found = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=90)
            assert process.returncode in (0, 3), err
            found.append((process.returncode, out.splitlines()[-1]))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return found


@pytest.mark.parametrize(
    ("mode", "size", "cases"),
    [
        ("tokens", 2, list(CASES)),
        ("tokens", 4, ["llama-mqa", "mistral-window", "qwen2-window", "qwen3-bias"]),
        ("device", 2, ["llama-mqa", "llama-tied", "qwen3-bias"]),
    ],
)
def test_every_model_type_generates_what_one_rank_does(checkpoints, mode, size, cases):
    """Greedy and seeded, with preemption, prefix hits and chunks; the ranks among each other too."""
    address, directories = free_address(), [str(checkpoints[name][0]) for name in cases]
    for code, line in outputs([ranks.start([mode], rank, size, address, *directories) for rank in range(size)]):
        assert code == 0, line
        assert dict(zip(cases, json.loads(line), strict=True)) == {name: checkpoints[name][1] for name in cases}


@pytest.mark.parametrize(
    ("fault", "account"),
    [
        ("none", "all-reduce: our kernel over peer memory for small steps"),
        ("open", "all-reduce: the library's, not our kernel over peer memory (planted)"),
        ("wrong", "all-reduce: the library's, not our kernel over peer memory (all_reduce (one_shot) is wrong)"),
    ],
)
def test_sums_over_peer_memory_are_used_where_all_ranks_can(checkpoints, tmp_path, fault, account):
    """Under the interpreter, in files that the ranks share. Rank 1 has the fault, and both use the library then."""
    directory, expected = checkpoints["llama-mqa"]
    address, file = free_address(), str(Path(__file__).with_name("peer_ranks.py"))
    args = [str(directory), str(tmp_path), fault]
    for rank, (code, line) in enumerate(outputs([ranks.start([], r, 2, address, *args, file=file) for r in range(2)])):
        assert code == 0, line
        found = json.loads(line)
        assert found["tokens"] == (expected if fault == "none" else [])
        assert (found["num_sums"] > 0) == (fault == "none")
        assert (
            found["account"] == account
            if rank or fault == "none"
            else found["account"].endswith("(another rank could not)")
        )


# The whole engine


MIX = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(seed=1, max_tokens=10, stop=[" the"]),
    SamplingParams(seed=2, max_tokens=8, logprobs=2, prompt_logprobs=1),
    SamplingParams(seed=3, max_tokens=12, structured_outputs=StructuredOutputsParams(regex="[a-z ]{4,9}")),
    SamplingParams(seed=4, max_tokens=10, repetition_penalty=1.3, min_p=0.05, n=2),
]
PROMPTS = [ONCE, ONCE + " a fox", "A wolf, meeting with a lamb", "In the woods", ONCE + " there was"]


def generate_mix(size: int, memory: str):
    """Twice, so that the second run finds the prefixes of the first."""
    options = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "block_size": 4, "max_model_len": 36}
    llm = LLM("demo", tensor_parallel_size=size, kv_cache_memory=memory, dtype="float32", **options)
    try:
        found = [llm.generate(PROMPTS, MIX, use_tqdm=False) for _ in range(2)]
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.scheduler.num_prefix_hits > 0
        if size > 1:
            llm.engine.runner.check_ranks_agree()
            assert llm.engine.runner.memory.num_blocks == llm.engine.scheduler.pool.num_blocks
        beams = llm.generate([ONCE], SamplingParams(temperature=0, max_tokens=3), use_tqdm=False)
    finally:
        llm.close()
    return [output for run in found for output in run] + beams


def test_the_engine_generates_what_one_rank_does():
    """Each rank keeps half of the heads, so half of the memory holds as many blocks."""
    for one, two in zip(generate_mix(1, "256KiB"), generate_mix(2, "128KiB"), strict=True):
        assert [(c.text, c.token_ids, c.finish_reason) for c in two.outputs] == [
            (c.text, c.token_ids, c.finish_reason) for c in one.outputs
        ]
        for c1, c2 in zip(one.outputs, two.outputs, strict=True):
            for l1, l2 in zip(c1.logprobs or [], c2.logprobs or [], strict=True):
                expected = {token: entry.logprob for token, entry in l1.items()}
                found = {token: entry.logprob for token, entry in l2.items()}
                assert found == pytest.approx(expected, abs=1e-4)


# Failures. A small runner, stepped by hand


SETTINGS = {"model": "demo", "device": "cpu", "max_model_len": 64, "max_num_seqs": 2, "max_num_batched_tokens": 32}


def make_runner(size: int = 2, deadlines: Deadlines | None = None, fault: tuple[str, ...] = (), **options):
    config = EngineConfig(**{**SETTINGS, "tensor_parallel_size": size, **options})
    opened = open_model(config)
    settings = resolve_settings(config, opened.model_config).settings
    kwargs = {"command": (sys.executable, str(Path(__file__).with_name("faulty_rank.py")), *fault)} if fault else {}
    return TensorParallelRunner(settings, opened.model_config, opened.directory, deadlines=deadlines, **kwargs)


def step(runner, number: int):
    """One token of a request of seven."""
    admitted, blocks = [], []
    if number == 0:
        admitted, blocks = [AdmittedRequest(0, [5, 6, 7], 3, SamplingParams(temperature=0), [], [])], [0, 1, 2, 3]
        return runner.execute(StepPlan(admitted, [ScheduledRow(0, 0, 3, True, blocks)], [], []))
    return runner.execute(StepPlan([], [ScheduledRow(0, 2 + number, 3 + number, True, [])], [], []))


def run_until_it_fails(runner, first: int = 0) -> str:
    """The cause. The ranks are gone, and stay so."""
    pids = runner.ranks.pids()
    numbers = iter(range(first, 50))
    with pytest.raises(RankError) as raised:
        deque((step(runner, number) for number in numbers), maxlen=0)
    with pytest.raises(RankError, match="tensor-parallel rank"):
        step(runner, 1)
    runner.close()
    assert not any(map(is_alive, pids))
    return str(raised.value)


def test_a_killed_rank_is_named():
    runner = make_runner(4)
    step(runner, 0)
    step(runner, 1)
    runner.check_ranks_agree()
    os.kill(runner.ranks.pids()[1], signal.SIGKILL)
    assert run_until_it_fails(runner, 2) == "tensor-parallel rank 2 was killed by SIGKILL (out of memory?)"


def test_a_stopped_rank_is_named():
    runner = make_runner(deadlines=Deadlines(heartbeat_s=1.0))
    step(runner, 0)
    os.kill(runner.ranks.pids()[0], signal.SIGSTOP)
    assert run_until_it_fails(runner, 1) == "tensor-parallel rank 1 gave no sign of life for 1 s"


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        ("memory", "tensor-parallel rank 1: ran out of memory: planted"),
        ("error", "tensor-parallel rank 1: RuntimeError: planted"),
        ("hang", "tensor-parallel rank 1 did not go on while computing a step, which took longer than 1 s"),
    ],
)
def test_a_rank_that_fails_in_a_step_is_named(fault, cause):
    runner = make_runner(deadlines=Deadlines(step_s=1.0 if fault == "hang" else 40.0), fault=(fault, "3"))
    assert run_until_it_fails(runner) == cause


def test_a_rank_that_samples_otherwise_is_found():
    """What `check_ranks_agree` is for. Logits are gathered, so a rank must be very wrong for it."""
    runner = make_runner(fault=("other tokens", "99"))
    step(runner, 0)
    runner._digests.append((1, 123))
    with pytest.raises(RankError, match="rank 1 has sampled other tokens by step 1"):
        runner.check_ranks_agree()
    runner.close()


def test_rank_0_that_fails_ends_the_others():
    runner = make_runner()
    pids = runner.ranks.pids()
    runner.rank_0.launch = lambda plan, masks: (_ for _ in ()).throw(torch.OutOfMemoryError("planted"))
    with pytest.raises(RankError, match="tensor-parallel rank 0: ran out of memory: planted"):
        step(runner, 0)
    runner.close()
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize(
    ("deadlines", "fault", "kind", "cause"),
    [
        (Deadlines(rendezvous_s=0.1), (), RankError, "the 2 ranks did not come together within 0.1 s: missing 1"),
        (None, ("exit", "5"), RankError, "tensor-parallel rank 1 ended with exit code 5"),
        (None, ("file", "1"), ValueError, "tensor-parallel rank 1: model.safetensors is broken"),
    ],
)
def test_a_start_that_fails_says_why(deadlines, fault, kind, cause):
    with pytest.raises(kind, match=cause):
        make_runner(deadlines=deadlines, fault=fault)


def test_the_server_names_the_rank_and_leaves_nothing():
    with ServerProcess("--tensor-parallel-size", "2", exit_code=1) as server:
        body = {"prompt": ONCE, "max_tokens": 5, "temperature": 0}
        assert server.client.post("/v1/completions", json=body).status_code == 200
        engine = server.engine_pid()
        (rank,) = rank_pids(engine)
        os.kill(rank, signal.SIGKILL)  # while idle
        assert server.wait() == 1
        assert [line for line in server.lines if "error" in line] == [
            "evenflow: error: tensor-parallel rank 1 was killed by SIGKILL (out of memory?)"
        ]
        assert not is_alive(engine)


def rank_pids(engine: int) -> list[int]:
    """Children of any of the engine's threads that are ranks."""
    tasks = Path(f"/proc/{engine}/task").iterdir()
    pids = {int(pid) for task in tasks for pid in (task / "children").read_text().split()}
    return [pid for pid in sorted(pids) if b"engine.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_the_ranks_die_with_the_engine(is_stopped):
    async def main():
        config = EngineConfig(**SETTINGS | {"tensor_parallel_size": 2})
        client = EngineClient(config, open_model(config))
        await client.start()
        engine = client._process.pid
        (rank,) = rank_pids(engine)
        if is_stopped:
            os.kill(rank, signal.SIGSTOP)
        os.kill(engine, signal.SIGKILL)
        assert "SIGKILL" in str(await client.wait_dead())
        await client.close()
        return rank

    rank = asyncio.run(main())
    while is_alive(rank):
        pass


def test_a_rank_that_dies_in_a_step_is_the_cause_that_the_front_reads():
    async def main():
        config = EngineConfig(**SETTINGS | {"tensor_parallel_size": 2})
        client = EngineClient(config, open_model(config))
        await client.start()
        (rank,) = rank_pids(client._process.pid)

        async def generate():
            async for _ in client.generate(ONCE, SamplingParams(max_tokens=50, ignore_eos=True)):
                os.kill(rank, signal.SIGKILL) if is_alive(rank) else None

        with pytest.raises(EngineDeadError, match="tensor-parallel rank 1 was killed by SIGKILL"):
            await generate()
        await client.close()

    asyncio.run(main())


# The rendezvous


def run_ip(*args: str) -> bool:
    return subprocess.run(["ip", *args], capture_output=True).returncode == 0


@pytest.fixture
def two_hosts():
    """Two network namespaces joined by a wire: their names, and the first one's address."""
    if shutil.which("ip") is None or not run_ip("netns", "add", f"evenflow-a-{os.getpid()}"):
        pytest.skip("network namespaces need `ip netns` and the right to make them")
    names = [f"evenflow-{side}-{os.getpid()}" for side in "ab"]
    try:
        assert run_ip("netns", "add", names[1])
        assert run_ip(
            "link", "add", "evenflow-a", "netns", names[0], "type", "veth", "peer", "evenflow-b", "netns", names[1]
        )
        for i, (name, link) in enumerate(zip(names, ("evenflow-a", "evenflow-b"), strict=True)):
            assert run_ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", link)
            assert run_ip("-n", name, "link", "set", link, "up")
            assert run_ip("-n", name, "link", "set", "lo", "up")
        yield names, "tcp://10.77.0.1:29511"
    finally:
        for name in names:
            run_ip("netns", "del", name)


def test_ranks_of_two_hosts_meet(two_hosts):
    names, address = two_hosts
    processes = [
        ranks.start(["sum"], rank, 2, address, "30", prefix=("ip", "netns", "exec", name))
        for rank, name in enumerate(names)
    ]
    assert outputs(processes) == [(0, "3.0 5"), (0, "3.0 5")]


def test_a_host_that_is_cut_off_is_missed_in_time(two_hosts):
    names, address = two_hosts
    assert run_ip("-n", names[1], "link", "set", "evenflow-b", "down")
    processes = [
        ranks.start(["sum"], rank, 2, address, "1", prefix=("ip", "netns", "exec", name))
        for rank, name in enumerate(names)
    ]
    (code_0, line_0), (code_1, line_1) = outputs(processes)
    assert (code_0, code_1) == (3, 3)
    assert line_0 == "the 2 ranks did not come together within 1 s: missing 1"
    assert line_1.startswith(f"rank 1 of 2 found nobody at {address} within 1 s")


def test_an_address_that_cannot_be_used_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f"tcp://127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"cannot listen on {taken}: .*in use.*choose another address"):
            join(0, 2, taken, torch.device("cpu"), deadline_s=1)
    for address in ("127.0.0.1:80", "tcp://127.0.0.1", "tcp://127.0.0.1:x", "udp://a:1"):
        with pytest.raises(ValueError, match="must be tcp://HOST:PORT"):
            listen(address)


# Sizes


@pytest.fixture(scope="module")
def model():
    return ModelConfig.from_hf(
        {
            "model_type": "llama",
            "vocab_size": 100,
            "hidden_size": 96,
            "intermediate_size": 96,
            "num_hidden_layers": 1,
            "num_attention_heads": 24,
            "num_key_value_heads": 6,
            "max_position_embeddings": 64,
        }
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (5, "tensor_parallel_size=5 cannot split this model's 24 attention heads.*; it can be 1, 2, 3, 6, 12, 24"),
        (4, "4 cannot split this model's 24 attention heads, 6 key heads and 96 MLP columns evenly"),
        (0, "tensor_parallel_size=0 must be an integer of at least 1"),
        (True, "tensor_parallel_size=True must be an integer"),
    ],
)
def test_a_size_that_cannot_be_is_refused(model, size, text):
    with pytest.raises(ValueError, match=text):
        resolve(EngineConfig(tensor_parallel_size=size), model, cpu.detect())


def test_more_ranks_than_gpus_are_refused(model):
    gpu = Platform("G", "cuda", "a", 32, None, 0, True, 10**9, "bfloat16", num_devices=2)
    assert resolve(EngineConfig(tensor_parallel_size=2), model, gpu).settings.tensor_parallel_size == 2
    with pytest.raises(ValueError, match="tensor_parallel_size=3 needs 3 GPUs, and PyTorch sees 2; lower it"):
        resolve(EngineConfig(tensor_parallel_size=3), model, gpu)


def test_the_view_of_a_rank(model):
    view = local_view(model, TensorParallel(5, 12))
    assert (view.num_heads, view.num_kv_heads, view.intermediate_size, view.vocab_size) == (2, 1, 8, 100)
    assert TensorParallel(5, 12).sharing("h", 6) == TensorParallel(2, 6)  # two neighbours to a key head
    with pytest.raises(ValueError, match="num_attention_heads=24 cannot be split over tensor_parallel_size=5"):
        local_view(model, TensorParallel(0, 5))


def test_a_second_group_in_a_process_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(ValueError, match="close the other LLM first"):
        join(0, 2, "tcp://127.0.0.1:0", torch.device("cpu"), deadline_s=1)
