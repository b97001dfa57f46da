"""Every kernel as the supported models launch it, as plain data: what the compile gate compiles for each architecture.

Owns the list of shapes; what a shape is compiled to is decided by the same functions that the launchers use.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from evenflow.kernels import rms_norm, silu_and_mul


@dataclass(frozen=True)
class Specialization:
    """One compile. kernel: "module:function". signature: Triton type of each argument that is no constexpr.

    aligned: the arguments that are divisible by 16. name: for people, unique among a kernel's.
    """

    kernel: str
    signature: dict[str, str]
    constexprs: dict[str, object]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int
    name: str


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides how its kernels are compiled."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    has_head_norm: bool = False
    windows: tuple[bool, ...] = field(default=(False,))


MODELS = (
    ModelShape("llama-2-7b", 4096, 11008, 32, 32, 128),
    ModelShape("llama-3-8b", 4096, 14336, 32, 8, 128),
    ModelShape("qwen3-0.6b", 1024, 3072, 16, 8, 128, has_head_norm=True),
)


def all_specializations(arch: str) -> list[Specialization]:
    """Without repetition, for an architecture as Platform.arch spells it."""
    found = {(s.kernel, s.name): s for model in MODELS for s in specializations(model, arch)}
    return list(found.values())


def specializations(model: ModelShape, arch: str) -> Iterator[Specialization]:
    """What one model launches, in bfloat16 and float16."""
    for dtype in ("bf16", "fp16"):
        yield _norm(model.hidden_size, dtype)
        yield _add_norm(model.hidden_size, dtype)
        yield _silu_and_mul(dtype)
        if model.has_head_norm:
            yield _norm(model.head_dim, dtype)


def _norm(size: int, dtype: str) -> Specialization:
    rows, block, num_warps = rms_norm.row_tile(size)
    pointers = dict.fromkeys(("x_ptr", "weight_ptr", "out_ptr"), f"*{dtype}")
    strides = dict.fromkeys(("token_stride", "head_stride", "D"), "i32")
    return Specialization(
        kernel=f"{rms_norm.__name__}:_rms_norm_kernel",
        signature=pointers | strides | {"num_rows": "i32", "num_heads": "i32", "eps": "fp32"},
        constexprs={"ROWS": rows, "BLOCK_D": block},
        aligned=(*pointers, *strides),
        num_warps=num_warps,
        num_stages=1,
        name=f"{dtype}-{size}",
    )


def _add_norm(size: int, dtype: str) -> Specialization:
    rows, block, num_warps = rms_norm.row_tile(size)
    pointers = dict.fromkeys(("x_ptr", "residual_ptr", "weight_ptr", "out_ptr", "sum_ptr"), f"*{dtype}")
    strides = dict.fromkeys(("x_stride", "residual_stride", "D"), "i32")
    return Specialization(
        kernel=f"{rms_norm.__name__}:_add_rms_norm_kernel",
        signature=pointers | strides | {"num_rows": "i32", "eps": "fp32"},
        constexprs={"ROWS": rows, "BLOCK_D": block},
        aligned=(*pointers, *strides),
        num_warps=num_warps,
        num_stages=1,
        name=f"{dtype}-{size}",
    )


def _silu_and_mul(dtype: str) -> Specialization:
    pointers = dict.fromkeys(("x_ptr", "out_ptr"), f"*{dtype}")
    return Specialization(
        kernel=f"{silu_and_mul.__name__}:_silu_and_mul_kernel",
        signature=pointers | {"x_stride": "i32", "D": "i32"},
        constexprs={"BLOCK": silu_and_mul.BLOCK},
        aligned=(*pointers, "x_stride", "D"),
        num_warps=silu_and_mul.NUM_WARPS,
        num_stages=1,
        name=dtype,
    )
