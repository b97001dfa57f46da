"""Compiling every kernel for every target in child processes: what was asked, what came out, and who died.

One child has one target and one cache directory. A child that dies costs the kernel at which it died; the next child
goes on with the rest.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from evenflow.crosscheck.artefacts import Dot

if TYPE_CHECKING:
    from evenflow.kernels.specializations import Specialization

TIMEOUT_S = 300.0  # of one kernel; the slowest that is known, 8-bit floats emulated on gfx1100, takes 24

COMPILER_SWITCHES = ("TRITON_", "MLIR_", "LLVM_", "PTXAS_", "DISABLE_PTXAS_OPT", "AMDGCN_", "NVPTX_")


@dataclass(frozen=True, slots=True)
class Resources:
    """What a compiled kernel takes and does; see artefacts.Code for the fields they share.

    occupancy: warps that a SIMD holds at once. matrix: matrix instructions by mnemonic. dots: each tl.dot of the
    source. argument_loads: for each pointer argument, loads by bytes per lane.
    """

    registers: int
    accumulators: int
    scalar_registers: int
    spills: int
    scratch_bytes: int
    shared_bytes: int
    occupancy: int
    num_instructions: int
    matrix: dict[str, int] = field(default_factory=dict)
    dots: list[Dot] = field(default_factory=list)
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)
    argument_loads: dict[str, dict[int, int]] = field(default_factory=dict)
    code_hash: str = ""


@dataclass(frozen=True, slots=True)
class Compiled:
    """One specialization on one target. resources is None exactly when error says why."""

    kernel: str
    name: str
    target: str
    error: str
    stderr: str
    compile_s: float
    resources: Resources | None

    @property
    def label(self) -> str:
        return label_of(self.kernel, self.name)


@dataclass(frozen=True, slots=True)
class Job:
    """What a child is told."""

    target: str
    specializations: "list[Specialization]"


def function_of(kernel: str) -> str:
    """ "rms_norm" of "evenflow.kernels.rms_norm:_rms_norm_kernel"."""
    return kernel.rpartition(":")[2].strip("_").removesuffix("_kernel")


def label_of(kernel: str, name: str) -> str:
    """What people call a specialization: "rms_norm/bf16-4096"."""
    return f"{function_of(kernel)}/{name}"


def is_kv_cache(argument: str) -> bool:
    """Kernels name the arguments that point into the KV cache so: k_cache_ptr, v_cache_ptr, kv_cache_ptr."""
    return "cache" in argument


def stderr_path(job_path: str, index: int) -> Path:
    """Where the child leaves what the compiler wrote to standard error for the job's kernel `index`."""
    return Path(job_path).with_suffix(f".{index}.stderr")


def compile_all(
    jobs: list[Job],
    num_processes: int,
    on_result: Callable[[Compiled], None] = lambda compiled: None,
    timeout_s: float = TIMEOUT_S,
) -> list[Compiled]:
    """Compile every job with at most `num_processes` children at a time. Results in the order of the jobs.

    on_result is called from several threads, as each kernel is done. timeout_s: of one kernel.
    """
    stop = threading.Event()
    shards = [shard for job in jobs for shard in _shards(job, -(-num_processes // max(len(jobs), 1)))]
    with (
        tempfile.TemporaryDirectory(prefix="evenflow-crosscheck-") as folder,
        ThreadPoolExecutor(num_processes) as pool,
    ):
        futures = [
            pool.submit(_compile_job, shard, Path(folder) / str(number), on_result, timeout_s, stop)
            for number, shard in enumerate(shards)
        ]
        try:
            done = {(c.target, c.kernel, c.name): c for future in futures for c in future.result()}
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [done[job.target, s.kernel, s.name] for job in jobs for s in job.specializations]


def _shards(job: Job, number: int) -> list[Job]:
    parts = [job.specializations[start::number] for start in range(number)]
    return [Job(job.target, part) for part in parts if part]


def _compile_job(
    job: Job, folder: Path, on_result: Callable[[Compiled], None], timeout_s: float, stop: threading.Event
) -> list[Compiled]:
    """One child after the other until each kernel has a result."""
    done: list[Compiled] = []
    folder.mkdir()
    while len(done) < len(job.specializations) and not stop.is_set():
        for compiled in _run_child(Job(job.target, job.specializations[len(done) :]), folder, timeout_s):
            done.append(compiled)
            on_result(compiled)
    return done


def _run_child(job: Job, folder: Path, timeout_s: float) -> Iterator[Compiled]:
    """Results of one child; the last one is the kernel that killed it, if one did."""
    job_path, startup = folder / "job", folder / "startup.stderr"
    job_path.write_bytes(pickle.dumps(job))
    with (
        startup.open("wb") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "evenflow.crosscheck.child", str(job_path)],
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=child_environment(folder / "cache"),
        ) as child,
    ):
        started = next(_lines(child, TIMEOUT_S), None) is not None
        index = 0
        for index, line in enumerate(_lines(child, timeout_s), start=1):  # noqa: B007
            yield msgspec.json.decode(line, type=Compiled)
        code = child.wait()
    if not started:  # triton itself, not a kernel
        reason = f"the compiling process did not start ({how_it_ended(code, timeout_s)})"
        yield from (_failed(job, i, reason, startup) for i in range(len(job.specializations)))
    elif index < len(job.specializations):
        reason = f"the compiler died ({how_it_ended(code, timeout_s)})"
        yield _failed(job, index, reason, stderr_path(str(job_path), index))


def _lines(child: "subprocess.Popen[bytes]", timeout_s: float) -> Iterator[bytes]:
    """Whole lines of the child's output. A child that is silent for timeout_s is killed."""
    assert child.stdout is not None
    while True:
        watchdog = threading.Timer(timeout_s, child.kill)
        watchdog.start()
        try:
            line = child.stdout.readline()
        finally:
            watchdog.cancel()
        if not line.endswith(b"\n"):
            return
        yield line


def how_it_ended(code: int, timeout_s: float = TIMEOUT_S) -> str:
    """A process's exit code in words."""
    if code == -signal.SIGKILL:
        return f"killed: out of memory, or more than {timeout_s:.0f} s"
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


def _failed(job: Job, index: int, reason: str, stderr: Path) -> Compiled:
    specialization = job.specializations[index]
    return Compiled(
        kernel=specialization.kernel,
        name=specialization.name,
        target=job.target,
        error=reason,
        stderr=stderr.read_text(errors="replace").strip() if stderr.exists() else "",
        compile_s=0.0,
        resources=None,
    )


def child_environment(cache: Path) -> dict[str, str]:
    """Ours, without the compilers' switches: the result must not depend on what a developer has set."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(COMPILER_SWITCHES)}
    return kept | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TRITON_CACHE_DIR": str(cache),
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",  # triton 3.10 flips the default, and 3.9 says so on every compile
        "OMP_NUM_THREADS": "1",
    }
