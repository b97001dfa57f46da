"""What a model needs of a GPU, and how fast it can be there at most: arithmetic on config.json and specs.toml.

Needs neither GPU nor torch. The speed is a physical limit, not a forecast: every step reads the weights and the keys
and values of its sequences once, and multiplies; what takes longer bounds it. With several GPUs sums go over the links
between them, and nothing else is done meanwhile.
"""

from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from typing import Any

from evenflow.config import DTYPE_BYTES, can_be_split
from evenflow.model_config import ModelConfig
from evenflow.model_files import find_model, read_json
from evenflow.platforms.gpu import fp8_dtype_of
from evenflow.platforms.specs import Specs, read_toml

MEMORY_SHARE = 0.9  # what the engine takes of a GPU by default
MEAN_REQUEST_TOKENS = 479  # prompt + output of ShareGPT's mean request
STEP_TOKENS = 8192  # of a step: a server takes 2,048, LLM on a large GPU 16,384
MAX_SEQS = 256
GPU_COUNTS = (1, 2, 4, 8)
# Between GPUs: the smallest sum of two H200 by our kernel, its norm included (benchmarks/all_reduce.py); NCCL: 11 us.
COLLECTIVE_S = 6e-6
PCIE_BYTES_PER_S = 64e9  # both ways together, version 4.0 with 16 lanes: where a GPU has no link of its own


@dataclass(frozen=True, slots=True)
class Plan:
    """A model on `num_gpus` of one GPU, tensor-parallel. Bytes are per GPU, tokens and requests of all together.

    limit_*: decoded tokens per second at most, at one request and at `num_concurrent` requests of the mean length, when
    memory and arithmetic overlap perfectly (ideal) and when they do not at all. link_share_*: of the time of a step of
    limit_one_request and limit_ideal, what goes to sums between the GPUs. reason: why it does not fit.
    """

    model: str
    gpu: str
    num_gpus: int
    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    num_parameters: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes_per_token: int  # of the whole model
    cache_bytes: int
    num_cache_tokens: int
    num_full_length_requests: float
    num_concurrent: int
    limit_one_request: float
    limit_ideal: float
    limit_no_overlap: float
    link_share_one_request: float
    link_share: float
    reason: str

    @property
    def fits(self) -> bool:
        return not self.reason

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "fits": self.fits}


def known_models() -> dict[str, dict[str, Any]]:
    """Public config.json values of well-known models, so that planning needs no network."""
    return read_toml(files("evenflow").joinpath("plan_models.toml"))


def read_model_config(model: str, revision: str | None = None) -> ModelConfig:
    """Of a known name, a directory, "demo" or a Hugging Face name. Raises ValueError."""
    if (hf := known_models().get(model.lower())) is not None:
        return ModelConfig.from_hf(hf)
    try:
        directory = find_model(model, revision, with_weights=False)
    except ValueError as error:
        raise ValueError(f"{error}. Known without files: {', '.join(known_models())}") from None
    return ModelConfig.from_hf(read_json(directory / "config.json"))


def make_plan(
    name: str,
    model: ModelConfig,
    specs: Specs,
    num_gpus: int = 1,
    *,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    max_model_len: int | None = None,
) -> Plan:
    """Raises ValueError for a number of GPUs that the model cannot be split over, or a context beyond the model's."""
    dtype = dtype if dtype != "auto" else model.dtype if model.dtype != "float32" else "bfloat16"
    fp8_dtype = fp8_dtype_of(specs.arch)
    lacks_fp8 = kv_cache_dtype == "fp8" and fp8_dtype is None
    kv_cache_dtype = {"auto": dtype, "fp8": fp8_dtype or "float8_e4m3fn"}.get(kv_cache_dtype, kv_cache_dtype)
    if not can_be_split(model, num_gpus):
        raise ValueError(
            f"--gpus {num_gpus} must divide the model's {model.num_heads} attention heads and "
            f"{model.intermediate_size} MLP columns, and divide or be divided by its {model.num_kv_heads} key heads"
        )
    context = max_model_len or model.max_context
    if context > model.max_context:
        raise ValueError(f"--max-model-len {context} exceeds the model's context of {model.max_context} tokens")
    local = _of_one_gpu(model, num_gpus)
    kv_bytes = local.kv_elements_per_token * DTYPE_BYTES[kv_cache_dtype]
    weight_bytes = local.num_parameters * DTYPE_BYTES[dtype]
    activation_bytes = _activation_bytes(model, num_gpus, DTYPE_BYTES[dtype])
    cache_bytes = max(int(specs.memory_bytes * MEMORY_SHARE) - weight_bytes - activation_bytes, 0)
    num_tokens = cache_bytes // kv_bytes
    num_concurrent = min(num_tokens // MEAN_REQUEST_TOKENS, MAX_SEQS)
    speed = _Speed(local, specs, num_gpus, DTYPE_BYTES[dtype], kv_bytes)
    one, all_of_them = speed.of(1), speed.of(num_concurrent)
    return Plan(
        model=name,
        gpu=specs.key,
        num_gpus=num_gpus,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
        max_model_len=context,
        num_parameters=model.num_parameters,
        weight_bytes=weight_bytes,
        activation_bytes=activation_bytes,
        kv_bytes_per_token=model.kv_elements_per_token * DTYPE_BYTES[kv_cache_dtype],
        cache_bytes=cache_bytes,
        num_cache_tokens=num_tokens,
        num_full_length_requests=num_tokens / context,
        num_concurrent=num_concurrent,
        limit_one_request=one.ideal,
        limit_ideal=all_of_them.ideal,
        limit_no_overlap=all_of_them.no_overlap,
        link_share_one_request=one.link_share,
        link_share=all_of_them.link_share,
        reason="it has no 8-bit floats; leave --kv-cache-dtype at auto"
        if lacks_fp8
        else _why_not(specs, weight_bytes + activation_bytes, num_tokens, context),
    )


def _of_one_gpu(model: ModelConfig, num_gpus: int) -> ModelConfig:
    """What one GPU holds. Key heads are replicated where there are fewer than GPUs; the vocabulary is rounded up."""
    return replace(
        model,
        num_heads=model.num_heads // num_gpus,
        num_kv_heads=max(model.num_kv_heads // num_gpus, 1),
        intermediate_size=model.intermediate_size // num_gpus,
        vocab_size=-(-model.vocab_size // num_gpus),
    )


def _activation_bytes(model: ModelConfig, num_gpus: int, element_bytes: int) -> int:
    """The largest step: the residual stream twice and the MLP's and attention's products of every token, and the logits
    of every sequence in float32 three times."""
    q_and_kv = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    per_token = 2 * model.hidden_size + (3 * model.intermediate_size + 2 * q_and_kv) // num_gpus
    return STEP_TOKENS * per_token * element_bytes + 3 * MAX_SEQS * model.vocab_size * 4


def _why_not(specs: Specs, fixed_bytes: int, num_tokens: int, context: int) -> str:
    budget = int(specs.memory_bytes * MEMORY_SHARE)
    if fixed_bytes >= budget:
        return f"weights and activations need {fixed_bytes / 1e9:.1f} GB of the {budget / 1e9:.1f} GB that may be used"
    if num_tokens < context:
        return f"the KV cache holds {num_tokens} tokens, less than one request of {context}; lower --max-model-len"
    return ""


@dataclass(frozen=True, slots=True)
class _Limit:
    """Tokens per second of all GPUs together, and the share of an ideal step that goes to sums between them."""

    ideal: float = 0.0
    no_overlap: float = 0.0
    link_share: float = 0.0


@dataclass(frozen=True, slots=True)
class _Speed:
    """The physical limit of one decode step. local: what one GPU holds."""

    local: ModelConfig
    specs: Specs
    num_gpus: int
    element_bytes: int
    kv_bytes: int

    def of(self, batch: int) -> _Limit:
        """For `batch` sequences at the mean request's length."""
        if not batch:
            return _Limit()
        model, context = self.local, MEAN_REQUEST_TOKENS
        embedding = model.vocab_size * model.hidden_size
        num_read = model.num_parameters
        if not model.tie_word_embeddings:  # of the input embedding only the batch's rows are read
            num_read -= embedding
        num_bytes = num_read * self.element_bytes + batch * context * self.kv_bytes
        memory_s = num_bytes / self.specs.bandwidth_bytes_per_s
        products = model.num_layers * model.num_layer_parameters + embedding
        attention = 2 * model.num_layers * model.num_heads * model.head_dim * context
        compute_s = 2 * batch * (products + attention) / self.specs.bf16_flops
        links_s = self.links_s(batch)
        ideal_s = max(memory_s, compute_s) + links_s
        return _Limit(batch / ideal_s, batch / (memory_s + compute_s + links_s), links_s / ideal_s)

    def links_s(self, batch: int) -> float:
        """Of the sums after the embedding and after each attention and MLP, and of the gathering of the logits.

        Of a sum, at least 2 (P - 1) / P of the message comes in at every GPU.
        """
        if self.num_gpus == 1:
            return 0.0
        model = self.local
        num_sums = 2 * model.num_layers + 1
        others = (self.num_gpus - 1) / self.num_gpus
        elements = num_sums * 2 * others * model.hidden_size + (self.num_gpus - 1) * model.vocab_size
        incoming_bytes_per_s = (self.specs.link_bytes_per_s or PCIE_BYTES_PER_S) / 2
        return (num_sums + 1) * COLLECTIVE_S + batch * elements * self.element_bytes / incoming_bytes_per_s
