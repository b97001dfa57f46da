"""Every kernel as the supported models launch it, as plain data: what the compile gate compiles for each architecture.

Owns the list of models and of a step's shapes. What they are compiled to is not written down a second time: the
launchers run on tensors without memory, and what they would have launched is recorded.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from evenflow.kernels import (
    attention_plan,
    draw,
    filter,
    linear,
    logprobs,
    many_row_linear,
    masks,
    paged_attention,
    penalties,
    rms_norm,
    rotary,
    sampling_table,
    silu_and_mul,
    step_inputs,
)
from evenflow.kernels.tuning import many_row_tiles

INT32_LIMIT = 1 << 31
TENSOR_TYPES = {
    "float64": "fp64",
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e4m3fnuz": "fp8e4b8",
    "float8_e5m2": "fp8e5",
    "float8_e5m2fnuz": "fp8e5b16",
    "int64": "i64",
    "int32": "i32",
    "int16": "i16",
    "int8": "i8",
    "uint32": "u32",
    "uint8": "u8",
    "bool": "i1",
}


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
    """What of a model decides how its kernels are compiled. window: of its attention, None for none.

    is_sample: compiled in float16, in float32 (heads of 128 at most) and with an 8-bit cache too. The others, whose
    kernels differ in constants only, are compiled in bfloat16.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    has_head_norm: bool = False
    window: int | None = None
    is_sample: bool = False


# Of shapes that several models share, the first is named.
MODELS = (
    ModelShape("llama-2-7b", 4096, 11008, 32, 32, 128, 32000, is_sample=True),
    ModelShape("llama-2-13b", 5120, 13824, 40, 40, 128, 32000),
    ModelShape("llama-2-70b", 8192, 28672, 64, 8, 128, 32000),
    ModelShape("llama-3-8b", 4096, 14336, 32, 8, 128, 128256, is_sample=True),
    ModelShape("llama-3-70b", 8192, 28672, 64, 8, 128, 128256),
    ModelShape("llama-3.2-1b", 2048, 8192, 32, 8, 64, 128256, is_sample=True),
    ModelShape("mistral-7b", 4096, 14336, 32, 8, 128, 32000, window=4096),
    ModelShape("danube-1.8b", 2560, 6912, 32, 8, 80, 32000, window=4096),
    ModelShape("qwen2.5-0.5b", 896, 4864, 14, 2, 64, 151936),
    ModelShape("qwen2.5-7b", 3584, 18944, 28, 4, 128, 152064),
    ModelShape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936, has_head_norm=True),
    ModelShape("qwen3-8b", 4096, 12288, 32, 8, 128, 151936, has_head_norm=True),
    ModelShape("heads-of-80", 2560, 6912, 32, 8, 80, 32000, is_sample=True),
    ModelShape("heads-of-96", 3072, 8192, 32, 32, 96, 32064),
    ModelShape("heads-of-256", 2048, 16384, 8, 4, 256, 128256, is_sample=True),
)
# Rows of a step: a few and many, neither divisible by 16, which is the general case.
NUM_ROWS = (3, 257)
NUM_TOKENS = 515
NUM_UPDATES = 7
MAX_FLOAT32_HEAD = 128  # larger ones would spill on gfx11 and gfx12, and no model that we know asks for them
MAX_MODEL_LEN = 8192
BLOCK_SIZE = 16
# Architectures that compile an 8-bit cache although it is no type of theirs would go here, with what converts it.
FP8_CACHES: dict[str, torch.dtype] = {
    "gfx942": torch.float8_e4m3fnuz,
    "gfx950": torch.float8_e4m3fn,
    "gfx12": torch.float8_e4m3fn,
    "sm_90": torch.float8_e4m3fn,
    "sm_10": torch.float8_e4m3fn,
}


def all_specializations(arch: str) -> list[Specialization]:
    """Without repetition, for an architecture as Platform.arch spells it."""
    found: dict[tuple[object, ...], Specialization] = {}
    for made in chain(_of_steps(arch), *(specializations(model, arch) for model in MODELS)):
        found.setdefault(_identity(made), made)
    names = {(made.kernel, made.name) for made in found.values()}
    assert len(names) == len(found), "two specializations of one kernel share a name"
    return list(found.values())


def _identity(made: Specialization) -> tuple[object, ...]:
    parts = (made.signature, made.constexprs)
    return (made.kernel, *(tuple(part.items()) for part in parts), made.aligned, made.num_warps, made.num_stages)


def specializations(model: ModelShape, arch: str) -> Iterator[Specialization]:
    """What one model launches, in bfloat16 and, if it is a sample, in the other types and with an 8-bit cache."""
    dtypes = [torch.bfloat16]
    if model.is_sample:
        dtypes += [torch.float16, torch.float32] if model.head_dim <= MAX_FLOAT32_HEAD else [torch.float16]
    for dtype in dtypes:
        name = f"{model.name}-{TENSOR_TYPES[_dtype_name(dtype)]}"
        yield from _of_layers(model, dtype, arch, name)
        if dtype.itemsize == 2:
            yield from _of_products(model, dtype, arch, name)
        yield from _of_cache(model, dtype, dtype, arch, name)
    fp8 = next((dtype for prefix, dtype in FP8_CACHES.items() if arch.startswith(prefix)), None)
    if model.is_sample and fp8 is not None:
        yield from _of_cache(model, torch.bfloat16, fp8, arch, f"{model.name}-bf16-fp8")
    for num_rows in NUM_ROWS:
        yield from _of_sampling(model.vocab_size, num_rows, arch, f"{model.name}-{num_rows}")


def _of_steps(arch: str) -> Iterator[Specialization]:
    """What is launched before a step's first layer, whatever the model."""
    tokens, tables = empty(NUM_ROWS[1], MAX_MODEL_LEN), empty(NUM_ROWS[1], MAX_MODEL_LEN // BLOCK_SIZE)
    made = [empty(NUM_TOKENS, dtype=torch.int64) for _ in range(3)]
    for num_rows in NUM_ROWS:
        rows = (empty(num_rows + 1), empty(num_rows), empty(num_rows))
        yield from record(
            step_inputs,
            f"{num_rows}",
            partial(step_inputs.launch_expand_rows, *rows, tokens, tables, BLOCK_SIZE, *made, arch=arch),
        )
    updates = empty(2, NUM_UPDATES)
    yield from record(step_inputs, "words", lambda: step_inputs.launch_scatter_words(tokens, updates, NUM_UPDATES))


def _of_layers(model: ModelShape, dtype: torch.dtype, arch: str, name: str) -> Iterator[Specialization]:
    hidden = empty(NUM_TOKENS, model.hidden_size, dtype=dtype)
    weight = empty(model.hidden_size, dtype=dtype)
    yield from record(rms_norm, name, lambda: rms_norm.launch_rms_norm(hidden, weight, 1e-5, arch=arch))
    yield from record(rms_norm, name, lambda: rms_norm.launch_add_rms_norm(hidden, hidden, weight, 1e-5, arch=arch))
    if model.has_head_norm:
        heads = _qkv(model, dtype)[:, : model.num_heads]
        head_weight = empty(model.head_dim, dtype=dtype)
        yield from record(
            rms_norm, f"{name}-heads", lambda: rms_norm.launch_rms_norm(heads, head_weight, 1e-6, arch=arch)
        )
    joint = empty(NUM_TOKENS, 2 * model.intermediate_size, dtype=dtype)
    yield from record(silu_and_mul, name, lambda: silu_and_mul.launch_silu_and_mul(joint, arch=arch))


def _of_products(model: ModelShape, dtype: torch.dtype, arch: str, name: str) -> Iterator[Specialization]:
    """Of one row and of a few, on every architecture, also where the library is taken."""
    heads, kv_heads = (number * model.head_dim for number in (model.num_heads, model.num_kv_heads))
    weights = {  # rows and their length
        "qkv": (heads + 2 * kv_heads, model.hidden_size),
        "o": (model.hidden_size, heads),
        "gate-up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "head": (model.vocab_size, model.hidden_size),
    }
    for what, shape in weights.items():
        x, weight, gated = empty(1, shape[1], dtype=dtype), empty(*shape, dtype=dtype), what == "gate-up"
        yield from record(linear, f"{name}-{what}", partial(linear.launch_linear, x, weight, gated=gated, arch=arch))
        for num_rows in linear.FEW_ROWS:
            if linear.few_row_launch(arch, num_rows, *shape) is not None:
                x = empty(num_rows, shape[1], dtype=dtype)
                launch = partial(linear.launch_few_row_linear, x, weight, gated=gated, arch=arch)
                yield from record(linear, f"{name}-{what}-{num_rows}", launch)
    x, weight = empty(NUM_TOKENS, model.hidden_size, dtype=dtype), empty(*weights["gate-up"], dtype=dtype)
    for tile in many_row_tiles(arch):
        many = partial(many_row_linear.launch_many_row_gated_linear, x, weight, tile, arch=arch)
        yield from record(many_row_linear, f"{name}-gate-up-{tile.block_n}-{tile.num_stages}", many)


def _of_cache(
    model: ModelShape, dtype: torch.dtype, cache_dtype: torch.dtype, arch: str, name: str
) -> Iterator[Specialization]:
    """What reads or writes the cache. A cache of 8 bits has one scale for keys and one for values."""
    heads = (model.num_heads, model.num_kv_heads)
    cache = empty(1000, 2, model.num_kv_heads, BLOCK_SIZE, model.head_dim, dtype=cache_dtype)
    scale = empty(1, dtype=torch.float32) if cache_dtype.itemsize == 1 else None
    angles = empty(MAX_MODEL_LEN, model.head_dim // 2, dtype=torch.float32)
    rows, qkv = _rows(model, NUM_ROWS[1], arch), _qkv(model, dtype)
    positions, store_index = rows.positions, rows.store_index
    yield from record(
        rotary, name, lambda: rotary.launch_rotary_and_store(
            qkv, cache, angles, angles, positions, store_index, *heads, scale, scale, arch=arch
        )
    )  # fmt: skip
    yield from record(
        paged_attention, name, lambda: paged_attention.launch_paged_attention(
            qkv[:, : model.num_heads], cache, rows, 0.1, model.window, None, scale, scale, arch=arch
        )
    )  # fmt: skip
    for num_rows in NUM_ROWS:
        steps = _rows(model, num_rows, arch)
        launch = partial(attention_plan.launch_plan_attention, steps, arch=arch)
        yield from record(attention_plan, f"{name}-{num_rows}", launch)


def _qkv(model: ModelShape, dtype: torch.dtype) -> Tensor:
    return empty(NUM_TOKENS, model.num_heads + 2 * model.num_kv_heads, model.head_dim, dtype=dtype)


def _rows(model: ModelShape, num_rows: int, arch: str) -> attention_plan.DeviceRows:
    return attention_plan.DeviceRows(
        query_starts=empty(num_rows + 1),
        seq_lens=empty(num_rows),
        slots=empty(num_rows),
        block_tables=empty(num_rows, MAX_MODEL_LEN // BLOCK_SIZE),
        store_index=empty(NUM_TOKENS, dtype=torch.int64),
        positions=empty(NUM_TOKENS, dtype=torch.int64),
        max_query_len=NUM_TOKENS,
        plan=attention_plan.make_plan(num_rows, model.num_heads, model.num_kv_heads, model.head_dim, "meta", arch=arch),
    )


def _of_sampling(vocab_size: int, num_rows: int, arch: str, name: str) -> Iterator[Specialization]:
    """Logits are the model's own until something edits them, then float32."""
    logits, raw = (empty(num_rows, vocab_size, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    slots, lengths = empty(num_rows), empty(num_rows)
    params = empty(num_rows, sampling_table.NUM_COLUMNS)
    tokens, scratch = empty(num_rows, MAX_MODEL_LEN), empty(num_rows, vocab_size)
    thresholds = empty(num_rows, dtype=torch.float32)
    bits, ids = empty(num_rows, -(-vocab_size // 32)), empty(num_rows)
    rows = (params, slots, lengths, tokens)
    yield from record(draw, name, lambda: draw.launch_draw(logits, *rows, arch=arch))
    yield from record(draw, f"{name}-filtered", lambda: draw.launch_draw(logits, *rows, thresholds, arch=arch))
    yield from record(draw, f"{name}-bf16", lambda: draw.launch_draw(raw, *rows, arch=arch))
    yield from record(filter, name, lambda: filter.launch_filter_thresholds(logits, params, slots, arch))
    yield from record(filter, f"{name}-bf16", lambda: filter.launch_filter_thresholds(raw, params, slots, arch))
    yield from record(
        penalties, name, lambda: penalties.launch_apply_penalties_(logits, tokens, params, slots, lengths, scratch)
    )
    yield from record(masks, name, lambda: masks.launch_apply_masks_(logits, slots, bits))
    yield from record(logprobs, name, lambda: logprobs.launch_token_logprobs(logits, ids, 20))


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def record(module: ModuleType, name: str, launch: Callable[[], object]) -> list[Specialization]:
    """What the kernels of `module` that `launch` launches are compiled to; nothing runs."""
    made: list[Specialization] = []

    def stand_in(kernel_name: str, kernel: Any) -> Any:
        return _Recorder(f"{module.__name__}:{kernel_name}", kernel, name, made)

    with replaced_kernels(module, stand_in):
        launch()
    return made


@contextmanager
def replaced_kernels(module: ModuleType, stand_in: Callable[[str, Any], Any]) -> Iterator[None]:
    """While it lasts, each `*_kernel` of `module` is stand_in(its name, the kernel)."""
    kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
    try:
        for name, kernel in kernels.items():
            setattr(module, name, stand_in(name, kernel))
        yield
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


class _Recorder:
    def __init__(self, path: str, kernel: Any, name: str, made: list[Specialization]) -> None:
        self._path, self._kernel, self._name, self._made = path, kernel, name, made

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launch(
            *args: Any, num_warps: int = 4, num_stages: int = 2, launch_pdl: bool = False, **kwargs: Any
        ) -> None:
            arguments = bind(self._kernel, args, kwargs)
            self._made.append(specialize(self._kernel, arguments, num_warps, num_stages, self._path, self._name))

        return launch


def bind(kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A launch's arguments by name."""
    bound = inspect.signature(kernel.fn).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def specialize(
    kernel: Any, arguments: dict[str, Any], num_warps: int, num_stages: int, path: str = "", name: str = ""
) -> Specialization:
    """What triton's launcher compiles for these arguments: 1 and None become constants, multiples of 16 are noted."""
    constexprs, signature, aligned = {}, {}, []
    for parameter in kernel.params:
        value = arguments[parameter.name]
        is_free = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not is_free):
            constexprs[parameter.name] = value
            continue
        signature[parameter.name] = _type_of(value)
        if not is_free and _is_aligned(value):
            aligned.append(parameter.name)
    return Specialization(path, signature, constexprs, tuple(aligned), num_warps, num_stages, name)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _type_of(value: Any) -> str:
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return f"tensordesc<{TENSOR_TYPES[_dtype_name(value.base.dtype)]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -INT32_LIMIT <= value < INT32_LIMIT else "i64"
    if isinstance(value, float):
        return "fp32"
    return "*" + TENSOR_TYPES[_dtype_name(value.dtype)]


def _is_aligned(value: Any) -> bool:
    if isinstance(value, (bool, float)) or hasattr(value, "block_shape"):
        return False
    if isinstance(value, int):
        return value % 16 == 0
    return bool(value.storage_offset() * value.element_size() % 16 == 0)
