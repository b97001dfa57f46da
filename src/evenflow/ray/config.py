"""What replicas are asked for, and how options are read from `serve run`'s name=value. Imports no ray."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evenflow.config import EngineConfig, option
from evenflow.server.config import ServerConfig

BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """How many engines, where, and when more. Raises ValueError that names the option."""

    replicas: int = option(1, "engines behind one endpoint; with --max-replicas, the fewest")
    max_replicas: int | None = option(None, "add engines up to so many while requests queue (default: a fixed number)")
    target_ongoing_requests: int = option(64, "with --max-replicas: requests per engine that the number aims at")
    max_ongoing_requests: int = option(512, "most requests that an engine holds; further ones wait in the endpoint")
    cpus_per_replica: float = option(1.0, "CPUs that Ray reserves for an engine")
    gpus_per_replica: int | None = option(None, "GPUs of one host reserved for an engine (default: one a rank)")
    prefix_aware: bool = option(True, "send prompts that begin alike to the same engine")

    def __post_init__(self) -> None:
        for name in ("replicas", "target_ongoing_requests", "max_ongoing_requests"):
            self._check_at_least(name, 1)
        if self.max_replicas is not None:
            self._check_at_least("max_replicas", self.replicas)
        if self.gpus_per_replica is not None:
            self._check_at_least("gpus_per_replica", 0)
        self._check_at_least("cpus_per_replica", 0)

    def _check_at_least(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not value >= low:  # also true for NaN
            raise ValueError(f"{name}={value!r} must be at least {low}")


def configs_from(args: Mapping[str, Any]) -> tuple[EngineConfig, ServerConfig, ReplicaConfig]:
    """Options by name, as text or as what they are. Raises ValueError for an unknown name or a wrong type."""
    kinds = (EngineConfig, ServerConfig, ReplicaConfig)
    fields = {field.name: (kind, field) for kind in kinds for field in dataclasses.fields(kind)}
    values: dict[type, dict[str, Any]] = {kind: {} for kind in kinds}
    for name, value in args.items():
        if name not in fields:
            near = difflib.get_close_matches(name, fields, n=1, cutoff=0.6)
            raise ValueError(f"unknown option {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
        kind, field = fields[name]
        values[kind][name] = _value(field, value)
    return (
        EngineConfig(**values[EngineConfig]),
        ServerConfig(**values[ServerConfig]),
        ReplicaConfig(**values[ReplicaConfig]),
    )


def _value(field: "dataclasses.Field[Any]", value: Any) -> Any:
    """'8' -> 8 for an integer field; what is no text stays as it is."""
    if not isinstance(value, str):
        return value
    type_name = field.type.__name__ if isinstance(field.type, type) else str(field.type)
    try:
        if isinstance(field.default, bool):
            return BOOLEANS[value.lower()]
        return int(value) if "int" in type_name else float(value) if "float" in type_name else value
    except (KeyError, ValueError):
        raise ValueError(f"{field.name}={value!r} must be of type {type_name}") from None
