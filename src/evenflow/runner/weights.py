"""Fills a model's parameters from safetensors files, each slot exactly once, or with random numbers."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from evenflow.layers.attention import cache_scales
from evenflow.layers.loading import Slot, checkpoint_slots
from evenflow.model_files import weight_files

FLOATS = {"F32", "F16", "BF16"}
DUMMY_STD = 0.02  # what most models are initialised with


def load_weights(model: nn.Module, directory: Path, *, is_tied: bool) -> None:
    """Read the checkpoint of `directory`. Raises ValueError naming the tensor that is missing, surplus or misshaped.

    Scales of the cache may be missing, all of them; then they stay 1.
    """
    slots, scales = checkpoint_slots(model), cache_scales(model)
    filled: set[str] = set()
    for path in weight_files(directory):
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                if name.endswith("rotary_emb.inv_freq"):
                    continue  # old LLaMA checkpoints store what config.json already says
                if name == "lm_head.weight" and is_tied and name not in slots:
                    _check_tied(file, directory)
                    continue
                if name in scales:
                    _fill_scale(scales.pop(name), file, name, path.name)
                    continue
                if name not in slots:
                    raise ValueError(f"{path.name}: tensor {name!r} has no place in {type(model).__name__}")
                if name in filled:
                    raise ValueError(f"{path.name}: tensor {name!r} is there twice")
                _fill(slots[name], file, name, path.name)
                filled.add(name)
    if 0 < len(scales) < len(cache_scales(model)):
        raise ValueError(f"{directory} has scales of the KV cache for some layers only; {min(scales)!r} is missing")
    if missing := slots.keys() - filled:
        raise ValueError(f"{directory} lacks {len(missing)} tensors, first {min(missing)!r}")


def _fill(slot: Slot, file: "safe_open", name: str, file_name: str) -> None:
    part = file.get_slice(name)
    if (dtype := part.get_dtype()) not in FLOATS:
        raise ValueError(f"{file_name}: tensor {name!r} has dtype {dtype}, which is not implemented (F32, F16, BF16)")
    if (shape := tuple(part.get_shape())) != slot.shape:
        raise ValueError(
            f"{file_name}: tensor {name!r} has shape {list(shape)}, config.json asks for {list(slot.shape)}"
        )
    if slot.target.numel():  # the last ranks may have nothing of a small vocabulary
        slot.target.copy_(part[slot.index or slice(None)])


def _fill_scale(target: Tensor, file: "safe_open", name: str, file_name: str) -> None:
    value = file.get_tensor(name).float()
    if value.numel() != 1 or not 0 < value.item() < float("inf"):
        raise ValueError(f"{file_name}: tensor {name!r} must be one positive number to scale the KV cache by")
    target.fill_(value.item())


def _check_tied(file: "safe_open", directory: Path) -> None:
    """A tied checkpoint may carry its head as well, if it is the embedding."""
    embedding = "model.embed_tokens.weight"
    if embedding in file.keys() and not torch.equal(file.get_tensor("lm_head.weight"), file.get_tensor(embedding)):  # noqa: SIM118
        raise ValueError(
            f"{directory}: lm_head.weight differs from the embedding although config.json says tie_word_embeddings; "
            "set it to false"
        )


@contextmanager
def _open(path: Path) -> Iterator["safe_open"]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}; download it again") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def fill_dummy(model: nn.Module, seed: int, rank: int = 0) -> None:
    """Random weights, made on the parameters' own device: normal with the usual deviation, norms 1, biases 0.

    The slices of different ranks differ.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if parameter.dim() == 1:
            parameter.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(parameter.device).manual_seed((seed + 1009 * rank) * 100_003 + index)
            parameter.data.normal_(0.0, DUMMY_STD, generator=generator)
