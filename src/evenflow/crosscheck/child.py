"""The process that compiles: one target each, because triton 3.6 leaks code of one target into the next.

`python -m evenflow.crosscheck.child JOB` reads the pickled job and writes one JSON line per kernel to what was its
standard output. The parent, `compiling`, survives whatever the compiler does to this process.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from evenflow.crosscheck.artefacts import Code, loads_per_argument, ptxas_complaints, read_amdgcn, read_dots, read_sass
from evenflow.crosscheck.compiling import Compiled, Job, Resources, is_kv_cache, stderr_path
from evenflow.crosscheck.targets import Target, find_target, occupancy

if TYPE_CHECKING:
    from evenflow.kernels.specializations import Specialization

MAX_ERROR_CHARS = 4000


def make(specialization: "Specialization", target: Target) -> Any:
    """Compile for `target`: triton's CompiledKernel, with `asm` and `metadata`. Raises whatever triton raises."""
    return make_kernel(find_kernel(specialization.kernel), specialization, target)


def make_kernel(kernel: Any, specialization: "Specialization", target: Target) -> Any:
    """The same of a @triton.jit function at hand."""
    triton, backends, compiler = (
        import_module(name) for name in ("triton", "triton.backends.compiler", "triton.compiler")
    )
    names, constexprs = kernel.arg_names, specialization.constexprs
    _check_names(specialization, names)
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constexprs else specialization.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={
            (position,): facts for position, name in enumerate(names) if (facts := _facts(name, specialization, target))
        },
    )
    return triton.compile(
        source,
        target=backends.GPUTarget(target.backend, target.triton_arch, target.warp_size),
        options={"num_warps": specialization.num_warps, "num_stages": specialization.num_stages},
    )


def _facts(name: str, specialization: "Specialization", target: Target) -> list[list[object]]:
    """What triton's launcher would find out about an argument; without it, loads stay narrow."""
    facts: list[list[object]] = [["tt.divisibility", 16]] if name in specialization.aligned else []
    is_pointer = specialization.signature.get(name, "").startswith("*")
    if target.is_amd and is_pointer and not is_kv_cache(name):
        facts.append(["tt.pointer_range", 32])  # tensors under 2 GiB, which only the cache is not: buffer instructions
    return facts


def read(made: Any, specialization: "Specialization", target: Target) -> Resources:
    """What a CompiledKernel takes and does."""
    code = read_amdgcn(made.asm["amdgcn"]) if target.is_amd else _read_cubin(made.asm["cubin"])
    # NVIDIA's static part is the reserve of each workgroup, which the target's facts count already.
    shared_bytes = made.metadata.shared + (code.static_shared_bytes if target.is_amd else 0)
    names = find_kernel(specialization.kernel).arg_names
    return Resources(
        registers=code.registers,
        accumulators=code.accumulators,
        scalar_registers=code.scalar_registers,
        spills=code.spills,
        scratch_bytes=code.scratch_bytes,
        shared_bytes=shared_bytes,
        occupancy=occupancy(target, code.registers, shared_bytes, specialization.num_warps),
        num_instructions=code.num_instructions,
        matrix={name: count for name, count in code.mnemonics.items() if target.is_matrix(name)},
        dots=read_dots(made.asm["ttir"]),
        loads=code.loads,
        stores=code.stores,
        argument_loads=loads_per_argument(
            made.asm["llir"], [name for name in names if name not in specialization.constexprs]
        ),
        code_hash=code.code_hash,
    )


def _check_names(specialization: "Specialization", names: list[str]) -> None:
    given = {*specialization.signature, *specialization.constexprs}
    if given != set(names) or not set(specialization.aligned) <= given:
        wrong = sorted((given ^ set(names)) | (set(specialization.aligned) - given))
        raise ValueError(f"the specialization and the kernel do not agree on {', '.join(wrong)}")


def find_kernel(path: str) -> Any:
    """The @triton.jit function of "package.module:function"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def _read_cubin(cubin: bytes) -> Code:
    tools = Path(str(import_module("triton").__file__)).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass = _output_of(tools / "nvdisasm", "-c", file.name)
        usage = _output_of(tools / "cuobjdump", "-res-usage", file.name)
    return read_sass(sass, usage)


def _output_of(tool: Path, *arguments: str) -> str:
    if not tool.exists():
        raise FileNotFoundError(f"this build of triton has no {tool.name}; `pip install triton` brings one that does")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{tool.name} failed: {done.stderr.strip()}")
    return done.stdout


def _attempt(specialization: "Specialization", target: Target, stderr: Path) -> Compiled:
    """Compile with file descriptors 1 and 2 in files: LLVM writes past Python, and triton prints ptxas's log."""
    error, resources = "", None
    stdout = stderr.with_suffix(".stdout")
    for path, descriptor in ((stdout, 1), (stderr, 2)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    start_s = time.perf_counter()
    try:
        resources = read(make(specialization, target), specialization, target)
    except Exception as problem:  # whatever it is, it is this kernel's failure, and the others go on
        error = _causes(problem)[-MAX_ERROR_CHARS:]
    compile_s = time.perf_counter() - start_s
    sys.stdout.flush()
    sys.stderr.flush()
    said = f"{stderr.read_text(errors='replace')}\n{ptxas_complaints(stdout.read_text(errors='replace'))}"
    return Compiled(
        kernel=specialization.kernel,
        name=specialization.name,
        target=target.arch,
        error=error,
        stderr=said.strip(),
        compile_s=compile_s,
        resources=resources,
    )


def _causes(problem: BaseException | None) -> str:
    """Of an error in a function that a kernel calls, triton says the line of the call and chains the reason."""
    lines = []
    while problem is not None:
        lines.append(f"{type(problem).__name__}: {problem}")
        problem = problem.__cause__
    return "\n".join(lines)


def _import_all(job: Job) -> None:
    """Before the first compile, so that what an import prints or costs is no kernel's fault."""
    import_module("triton.compiler")
    for path in sorted({specialization.kernel for specialization in job.specializations}):
        try:
            find_kernel(path)
        except Exception:  # the kernel that needs it will raise it again, in its own name
            continue


def main(job_path: str) -> None:
    job: Job = pickle.loads(Path(job_path).read_bytes())
    target = find_target(job.target)
    results = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    _import_all(job)
    results.write(b"ready\n")
    for index, specialization in enumerate(job.specializations):
        compiled = _attempt(specialization, target, stderr_path(job_path, index))
        results.write(msgspec.json.encode(compiled) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1])
