"""The data sheet of each GPU, from specs.toml: what bounds the speed of anything that runs on it."""

import difflib
import re
import sys
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from importlib.abc import Traversable


@dataclass(frozen=True, slots=True)
class Specs:
    """Peak numbers of one GPU. FLOP rates are dense; 0 means that the GPU has no such unit, or no such link.

    verified: the numbers were compared with `source`.
    """

    key: str
    name: str
    arch: str
    memory_bytes: int
    bandwidth_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float
    link_bytes_per_s: float
    watts: int
    source: str
    verified: bool
    aliases: tuple[str, ...] = ()
    note: str = ""


def read_toml(file: "Traversable") -> dict[str, dict[str, Any]]:
    """A TOML file of tables."""
    tables: dict[str, dict[str, Any]] = tomllib.loads(file.read_text(encoding="utf-8"))
    return tables


@cache
def all_specs() -> dict[str, Specs]:
    """Every GPU of specs.toml by its key, in the file's order."""
    found = {}
    for key, values in read_toml(files("evenflow.platforms").joinpath("specs.toml")).items():
        units = {name: float(values.pop(name)) for name in ("memory_gb", "bandwidth_gb_per_s", "bf16_tflops")}
        found[key] = Specs(
            key=key,
            memory_bytes=int(units["memory_gb"] * 1e9),
            bandwidth_bytes_per_s=units["bandwidth_gb_per_s"] * 1e9,
            bf16_flops=units["bf16_tflops"] * 1e12,
            fp8_flops=float(values.pop("fp8_tflops", 0)) * 1e12,
            link_bytes_per_s=float(values.pop("link_gb_per_s", 0)) * 1e9,
            aliases=tuple(values.pop("aliases", ())),
            **values,
        )
    return found


def normalized(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_specs(name: str) -> Specs:
    """The GPU of that name or alias; case, spaces and dashes do not matter. Raises ValueError naming the nearest."""
    names = {normalized(n): specs for specs in all_specs().values() for n in (specs.key, specs.name, *specs.aliases)}
    if (wanted := normalized(name)) in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    hint = f"; did you mean {names[near[0]].key}?" if near else "."
    raise ValueError(f"GPU {name!r} is not listed{hint} Known are {', '.join(all_specs())}")


def match_device(device_name: str) -> Specs | None:
    """The specs of what a driver calls itself, e.g. 'NVIDIA H100 80GB HBM3' or 'AMD Instinct MI300X'."""
    device = normalized(device_name)
    names = [(normalized(n), specs) for specs in all_specs().values() for n in (specs.key, *specs.aliases)]
    found = [(len(n), specs) for n, specs in names if n in device]
    return max(found, key=lambda pair: pair[0])[1] if found else None
