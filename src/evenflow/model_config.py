"""The facts of a model, read strictly from a Hugging Face config.json.

Every key is either implemented, known not to change the computation, or refused by name: a key that is skipped in
silence is a model that writes nonsense. Imports no torch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Keys that say nothing about the computation of the next token.
IGNORED = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id eos_token_id pad_token_id
    unk_token_id initializer_range attention_dropout hidden_dropout _name_or_path name_or_path pretraining_tp
    output_attentions output_hidden_states return_dict chunk_size_feed_forward id2label label2id is_decoder
    problem_type tokenizer_class model_max_length max_length max_sequence_length task_specific_params
    _attn_implementation _attn_implementation_autoset attn_implementation auto_map unsloth_version unsloth_fixed
    is_llama_config transformers.js_config language finetuning_task torchscript neftune_noise_alpha
    top_k top_p temperature do_sample
    """.split()
)
# Of a quantization_config that is about the KV cache only.
CACHE_SCALE_KEYS = frozenset(
    "quant_method kv_cache_scheme format ignore quantization_status global_compression_ratio version".split()
)
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding. Fields beside `kind`, `theta` and `factor` belong to the kind that names them."""

    kind: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Shapes and options of one decoder-only model. windows[i]: layer i attends to that many last tokens, None: all."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position: int
    max_context: int  # max_position, stretched where the rope kind stretches it
    rms_norm_eps: float
    rope: RopeConfig
    windows: tuple[int | None, ...]
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_hf(cls, hf: dict[str, Any]) -> "ModelConfig":
        """Read config.json. Raises ValueError that names the key and the value that are not implemented."""
        return _read(_Reader(hf))

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def num_layer_parameters(self) -> int:
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = self.hidden_size * (2 * q_size + 2 * kv_size)
        biases = (q_size + 2 * kv_size) * self.qkv_bias + self.hidden_size * self.attention_out_bias
        biases += (2 * self.intermediate_size + self.hidden_size) * self.mlp_bias
        norms = 2 * self.hidden_size + (2 * self.head_dim if self.model_type == "qwen3" else 0)
        return attention + 3 * self.hidden_size * self.intermediate_size + biases + norms

    @property
    def num_layer_kv_parameters(self) -> int:
        """Of a layer's parameters, those that its keys and values come from: two projections, and the norms there."""
        kv_size = self.num_kv_heads * self.head_dim
        norms = self.hidden_size + (self.head_dim if self.model_type == "qwen3" else 0)
        return 2 * kv_size * (self.hidden_size + self.qkv_bias) + norms

    @property
    def num_parameters(self) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_layers * self.num_layer_parameters + self.hidden_size


class _Reader:
    """config.json with a memory of what was asked for."""

    def __init__(self, hf: dict[str, Any]) -> None:
        if not isinstance(hf, dict) or not isinstance(hf.get("model_type"), str):
            raise ValueError("config.json has no model_type; Evenflow reads Hugging Face model directories")
        self.hf = hf
        self.model_type: str = hf["model_type"]
        self._seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self._seen.add(key)
        value = self.hf.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {key}={value!r} must be a positive integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < float("inf"):
            raise ValueError(f"config.json: {key}={value!r} must be a positive number")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {key}={value!r} must be true or false")
        return value

    def only(self, key: str, allowed: tuple[Any, ...]) -> None:
        """The key may be absent or null; any other value than `allowed` is refused."""
        if (value := self.get(key)) is not None and value not in allowed:
            raise ValueError(
                f"config.json: {key}={value!r} is not implemented for {self.model_type} (only {allowed[0]!r})"
            )

    def finish(self) -> None:
        for key, value in self.hf.items():
            if key not in self._seen and key not in IGNORED and value not in (None, False, [], {}, ""):
                raise ValueError(
                    f"config.json: {key}={value!r:.80} is not implemented for {self.model_type}; "
                    "if it does not change the computation, remove it from config.json"
                )


def _read(reader: _Reader) -> ModelConfig:
    kind = reader.model_type
    if kind not in MODEL_TYPES:
        raise ValueError(f"model_type {kind!r} is not implemented; implemented are {', '.join(MODEL_TYPES)}")
    _accept_cache_scales(reader)
    reader.only("hidden_act", ("silu",))
    reader.only("partial_rotary_factor", (1.0,))
    num_layers, num_heads = reader.integer("num_hidden_layers"), reader.integer("num_attention_heads")
    hidden_size = reader.integer("hidden_size")
    # Absent in LLaMA-1 and 2: one key head per query head. The others always say it.
    num_kv_heads = reader.integer("num_key_value_heads", num_heads if kind == "llama" else None)
    if num_heads % num_kv_heads:
        raise ValueError(f"config.json: num_key_value_heads={num_kv_heads} must divide num_attention_heads={num_heads}")
    max_position = reader.integer("max_position_embeddings")
    rope, max_context = _rope(reader, max_position)
    attention_bias = reader.boolean("attention_bias", False) if kind in ("llama", "qwen3") else False
    config = ModelConfig(
        model_type=kind,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(reader, hidden_size, num_heads),
        max_position=max_position,
        max_context=max_context,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=rope,
        windows=_windows(reader, num_layers),
        qkv_bias=attention_bias or kind == "qwen2",
        attention_out_bias=attention_bias,
        mlp_bias=reader.boolean("mlp_bias", False) if kind == "llama" else False,
        tie_word_embeddings=reader.boolean("tie_word_embeddings", False),
        dtype=_dtype(reader),
        bos_token_id=reader.get("bos_token_id"),
        eos_token_ids=token_ids(reader.get("eos_token_id")),
    )
    reader.finish()
    return config


def _accept_cache_scales(reader: _Reader) -> None:
    """Of quantized checkpoints, those whose weights are not: they bring scales of each layer's keys and values."""
    quantization = reader.hf.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "compressed-tensors":
        return
    scheme = quantization.get("kv_cache_scheme")
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    is_known = isinstance(scheme, dict) and wanted.items() <= scheme.items() and not scheme.get("dynamic")
    if is_known and not any(value for key, value in quantization.items() if key not in CACHE_SCALE_KEYS):
        reader.get("quantization_config")


def token_ids(value: Any) -> tuple[int, ...]:
    """eos_token_id as config files give it (absent, an id, or a list) -> a tuple."""
    values = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values):
        raise ValueError(f"eos_token_id={value!r} must be a token id or a list of them")
    return tuple(values)


def _head_dim(reader: _Reader, hidden_size: int, num_heads: int) -> int:
    if reader.model_type == "qwen3":
        head_dim = reader.integer("head_dim", 128)
    elif reader.get("head_dim") is not None:
        head_dim = reader.integer("head_dim")
    elif hidden_size % num_heads:
        raise ValueError(f"config.json: hidden_size={hidden_size} is no multiple of num_attention_heads={num_heads}")
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise ValueError(f"config.json: head_dim={head_dim} must be even for rotary embeddings")
    return head_dim


def _dtype(reader: _Reader) -> str:
    name = reader.hf.get("dtype") or reader.hf.get("torch_dtype") or "float32"
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"config.json: dtype {name!r} is not implemented (float32, bfloat16, float16)")
    return str(name)


def _windows(reader: _Reader, num_layers: int) -> tuple[int | None, ...]:
    """Sliding windows by layer, as each model type defines them."""
    if reader.model_type == "llama":
        return (None,) * num_layers
    if reader.model_type == "mistral":
        # A missing key means Mistral's own default, an explicit null means none.
        window = reader.integer("sliding_window", 4096) if reader.hf.get("sliding_window", 4096) is not None else None
        reader.get("sliding_window")
        reader.only("layer_types", (["sliding_attention" if window else "full_attention"] * num_layers,))
        return (window,) * num_layers
    uses_window = reader.boolean("use_sliding_window", False)
    first_window_layer = reader.get("max_window_layers", 28)
    window = reader.integer("sliding_window", 4096) if uses_window and reader.get("sliding_window", 4096) else None
    reader.get("sliding_window")
    layer_types = reader.get("layer_types")
    if layer_types is None:
        layer_types = [LAYER_TYPES[window is not None and i >= first_window_layer] for i in range(num_layers)]
    if len(layer_types) != num_layers or not set(layer_types) <= set(LAYER_TYPES):
        raise ValueError(f"config.json: layer_types={layer_types!r:.80} must name {num_layers} of {LAYER_TYPES}")
    return tuple(window if layer_type == "sliding_attention" else None for layer_type in layer_types)


def _rope(reader: _Reader, max_position: int) -> tuple[RopeConfig, int]:
    """Both spellings: rope_parameters (with rope_theta inside) and rope_theta + rope_scaling. Also the context."""
    parameters = dict(reader.get("rope_parameters") or reader.get("rope_scaling") or {})
    reader.get("rope_scaling")
    theta = parameters.pop("rope_theta", None) or reader.get("rope_theta", 10000.0)
    reader.get("rope_theta")
    old_kind = parameters.pop("type", None)
    kind = parameters.pop("rope_type", None) or old_kind or "default"
    if kind not in _ROPE_KINDS:
        raise ValueError(
            f"config.json: rope type {kind!r} is not implemented for {reader.model_type} ({', '.join(_ROPE_KINDS)} are)"
        )
    if parameters.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise ValueError("config.json: partial_rotary_factor other than 1 is not implemented")
    outer = reader.get("original_max_position_embeddings")
    original = outer or parameters.pop("original_max_position_embeddings", None) or max_position
    parameters.pop("original_max_position_embeddings", None)
    fields = {key: parameters.pop(key) for key in _ROPE_KINDS[kind] if parameters.get(key) is not None}
    if unknown := {key: value for key, value in parameters.items() if value is not None}:
        raise ValueError(f"config.json: rope parameter {min(unknown)!r} is not implemented for rope type {kind!r}")
    if kind != "default" and "factor" not in fields:
        if kind != "yarn":
            raise ValueError(f"config.json: rope type {kind!r} needs a factor")
        fields["factor"] = max_position / original
    for key, value in fields.items():
        if key != "truncate" and (not isinstance(value, (int, float)) or not 0 < value < float("inf")):
            raise ValueError(f"config.json: rope parameter {key}={value!r} must be a positive number")
    rope = RopeConfig(kind=kind, theta=float(theta), original_max_position=int(original), **fields)
    return rope, _MAX_CONTEXT[kind](rope, max_position) if kind in _MAX_CONTEXT else max_position


_ROPE_KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
# How far each kind stretches the context. "dynamic" changes the angles of all earlier tokens when a sequence passes
# max_position, which no KV cache can follow, so its context ends there (docs/decisions/003.md).
_MAX_CONTEXT: dict[str, Callable[[RopeConfig, int], int]] = {
    "linear": lambda rope, max_position: int(max_position * rope.factor),
    "yarn": lambda rope, max_position: max(max_position, int(rope.original_max_position * rope.factor)),
}
