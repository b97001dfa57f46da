"""How checkpoint tensors find their parameters: every layer offers slots, and every slot is filled exactly once."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from evenflow.distributed import TensorParallel


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a model's parameters are made."""

    device: torch.device
    dtype: torch.dtype
    tp: TensorParallel = field(default_factory=TensorParallel)

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(*shape, dtype=self.dtype, device=self.device), requires_grad=False)


@dataclass(frozen=True, slots=True)
class Slot:
    """A checkpoint tensor of `shape`, of which the part `index` belongs into `target`."""

    target: Tensor
    shape: tuple[int, ...]
    index: tuple[slice, ...] = ()


@runtime_checkable
class HasSlots(Protocol):
    _parameters: dict[str, nn.Parameter | None]

    def slots(self) -> Iterator[tuple[str, Slot]]:
        """(name in the checkpoint, slot) of every parameter of the layer.

        A name is relative to the layer's parent, or, where it begins with a dot, to the layer.
        """


def checkpoint_slots(model: nn.Module) -> dict[str, Slot]:
    """Every tensor that the checkpoint must have. Parameters without slots have their own name and shape."""
    slots: dict[str, Slot] = {}
    covered: set[str] = set()
    for path, module in model.named_modules():
        if isinstance(module, HasSlots):
            parent = path.rpartition(".")[0]
            for name, slot in module.slots():
                slots[path + name if name.startswith(".") else f"{parent}.{name}" if parent else name] = slot
            covered.update(f"{path}.{name}" for name in module._parameters)
    for name, parameter in model.named_parameters():
        if name not in covered:
            slots[name] = Slot(parameter.data, tuple(parameter.shape))
    return slots
