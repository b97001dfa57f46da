"""Compile `triton_kernels` for one target in a child process with its own cache: Triton keeps state between targets.

Run as a script it is the child: `python compiled.py gfx942 out.json`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TARGETS = ("gfx90a", "gfx942", "gfx950")
FP8 = {"gfx90a": "fp8e5", "gfx942": "fp8e4b8", "gfx950": "fp8e4nv"}


@dataclass(frozen=True)
class Compiled:
    """What a test needs of a compiled kernel."""

    assembly: str
    shared_bytes: int
    num_warps: int


def cases(arch: str) -> dict[str, tuple[str, dict[str, str], dict[str, int], dict[str, int]]]:
    """name: (kernel, types of arguments, constants, options)."""
    fp8 = FP8[arch]
    found: dict[str, Any] = {
        "vector_add": ("vector_add", "*fp32 *fp32 *fp32 i32", {"block": 512}, {}),
        "softmax_fp32": ("softmax", "*fp32 *fp32 i32 i32", {"block": 512}, {}),
        "softmax_bf16": ("softmax", "*bf16 *bf16 i32 i32", {"block": 512}, {}),
        "integer_matmul": ("integer_matmul", "*i8 *i8 *i32", {"n": 64}, {}),
        "sort": ("sort", "*fp32 *fp32", {"n": 256}, {}),
        "philox": ("philox", "*i32 i32", {"n": 256}, {}),
        "scatter_add_fp32": ("scatter_add", "*fp32 *i32 *fp32", {"n": 256}, {}),
        "scatter_add_i32": ("scatter_add", "*i32 *i32 *i32", {"n": 256}, {}),
        "histogram": ("histogram", "*i32 *i32", {"n": 1024, "bins": 64}, {}),
        "reductions": ("reductions", "*fp32 *fp32 *fp32 *i32 *fp32", {"n": 512}, {}),
        "paged_gather": ("paged_gather", "*fp16 *i32 *i32 *fp16 i32", {"block_size": 16, "width": 64, "n": 32}, {}),
        "elementwise": ("elementwise", "*fp32 *fp32 *fp32", {"n": 256}, {}),
        "cast_to_bf16": ("cast", "*fp32 *bf16", {"n": 1024}, {}),
        "cast_to_fp8": ("cast", f"*fp32 *{fp8}", {"n": 1024}, {}),
        "cast_from_fp8": ("cast", f"*{fp8} *fp32", {"n": 256}, {}),
        "meet": ("meet", "*i32 *i32 i32", {}, {"num_warps": 1}),
    }
    for kind in ("fp16", "bf16", "fp32", fp8):
        name = "fp8" if kind == fp8 else kind
        constants = {"m": 64, "n": 64, "k": 64 if kind != "fp32" else 32}
        found[f"matmul_{name}"] = ("matmul", f"*{kind} *{kind} *fp32 i32 i32 i32 i32", constants, {"num_stages": 2})
    for kind in ("fp16", "bf16"):
        constants = {"group": 4, "width": 64, "block_size": 16, "n": 32}
        types = f"*{kind} *{kind} *{kind} *i32 *i32 *{kind} fp32 i32 i32"
        found[f"paged_attention_{kind}"] = ("paged_attention", types, constants, {})
    if arch == "gfx950":
        found["scaled_matmul"] = ("scaled_matmul", "*fp8e4nv *u8 *fp8e4nv *u8 *fp32", {"m": 64, "k": 128}, {})
    return found


def compile_all(arch: str) -> dict[str, dict[str, Any]]:
    """Every case for this target, as JSON can hold it."""
    import triton
    import triton_kernels
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiled = {}
    for case, (kernel_name, types, constants, options) in cases(arch).items():
        kernel = getattr(triton_kernels, kernel_name)
        names = kernel.arg_names
        typed = iter(types.split())
        signature = {name: "constexpr" if name in constants else next(typed) for name in names}
        # What the runtime would find out: pointers and strides are multiples of 16.
        aligned = [n for n in names if signature[n][0] == "*" or n.startswith("stride") or n == "k_total"]
        source = ASTSource(
            kernel,
            signature,
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
        )
        result = triton.compile(source, target=GPUTarget("hip", arch, 64), options={"num_warps": 4, **options})
        compiled[case] = {
            "assembly": result.asm["amdgcn"],
            "shared_bytes": result.metadata.shared,
            "num_warps": result.metadata.num_warps,
        }
    return compiled


def compile_in_child(arch: str, folder: Path) -> dict[str, Compiled]:
    """All cases for one target. folder: for the cache and the result."""
    output = folder / f"{arch}.json"
    environment = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__)), arch, str(output)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE, check=False)
    assert done.returncode == 0, f"compiling for {arch} failed:\n{done.stderr}"
    return {name: Compiled(**fields) for name, fields in json.loads(output.read_text()).items()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(compile_all(sys.argv[1])))
