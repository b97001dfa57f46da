"""Engine and sampling options: the fields of EngineConfig and SamplingParams as command-line options."""

import argparse
import dataclasses
import sys
from typing import Any

from evenflow.config import EngineConfig

# name, type, metavar, help; defaults are the model's own
SAMPLING: tuple[tuple[str, type, str, str], ...] = (
    ("max_tokens", int, "N", "most tokens to generate"),
    ("temperature", float, "T", "0 always takes the likeliest token"),
    ("top_p", float, "P", "sample from the likeliest tokens that together have this probability"),
    ("top_k", int, "K", "sample from the K likeliest tokens; 0: all"),
    ("min_p", float, "P", "sample from tokens with at least this share of the likeliest one's probability"),
    ("seed", int, "N", "the same seed gives the same text"),
    ("n", int, "N", "completions per prompt"),
    ("repetition_penalty", float, "X", "above 1: repeat less"),
    ("presence_penalty", float, "X", "above 0: new tokens rather than used ones"),
    ("frequency_penalty", float, "X", "above 0: the less, the more often used"),
    ("min_tokens", int, "N", "do not stop before"),
)


def add_engine_options(
    parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = (), has_explain: bool = True
) -> None:
    """One option per field of EngineConfig. Not given: absent from the namespace."""
    group = parser.add_argument_group("engine")
    add_options(group, EngineConfig, "engine_", leave_out)
    if has_explain:
        group.add_argument(
            "--explain", action="store_true", help="print every resolved setting and why, load nothing, and exit"
        )


def add_options(
    group: argparse._ArgumentGroup, config: type[Any], prefix: str, leave_out: tuple[str, ...] = ()
) -> None:
    """One option per field of a configuration. Not given: absent from the namespace."""
    for field in dataclasses.fields(config):
        if field.name in leave_out:
            continue
        flags = ["--" + field.name.replace("_", "-")]
        if field.name == "model":
            flags.insert(0, "-m")
        settings: dict[str, Any] = {"help": field.metadata["help"] + _default_text(field), "default": argparse.SUPPRESS}
        settings["dest"] = prefix + field.name
        if "bool" in str(field.type):
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings["type"] = int if "int" in str(field.type) else float if "float" in str(field.type) else str
            settings["choices"] = field.metadata["choices"]
            settings["metavar"] = None if field.metadata["choices"] else settings["type"].__name__.upper()
        group.add_argument(*flags, **settings)


def _default_text(field: "dataclasses.Field[Any]") -> str:
    """' (default: 8000)', unless the help says it, or the default decides nothing."""
    default = (
        {True: "yes", False: "no"}.get(field.default, field.default)
        if isinstance(field.default, bool)
        else field.default
    )
    return "" if default is None or "default" in field.metadata["help"] else f" (default: {default})"


def add_sampling_options(parser: argparse.ArgumentParser, *, leave_out: tuple[str, ...] = ()) -> None:
    group = parser.add_argument_group("sampling (default: what the model's generation_config.json says)")
    for name, kind, metavar, text in SAMPLING:
        if name in leave_out:
            continue
        flag = "--" + name.replace("_", "-")
        group.add_argument(
            flag, dest="sampling_" + name, type=kind, metavar=metavar, help=text, default=argparse.SUPPRESS
        )
    group.add_argument(
        "--stop",
        dest="sampling_stop",
        action="append",
        metavar="TEXT",
        help="end before this text; may be given several times",
        default=argparse.SUPPRESS,
    )
    group.add_argument(
        "--ignore-eos",
        dest="sampling_ignore_eos",
        action="store_true",
        help="go on after the end-of-sequence token",
        default=argparse.SUPPRESS,
    )


def given(args: argparse.Namespace, prefix: str) -> dict[str, Any]:
    """The options of a group that the user gave, by field name."""
    return {name[len(prefix) :]: value for name, value in vars(args).items() if name.startswith(prefix)}


def engine_config(args: argparse.Namespace) -> EngineConfig:
    return EngineConfig(**given(args, "engine_"))


def explain(config: EngineConfig, *, is_offline: bool) -> int:
    """Every setting, its value and the reason of it, as a table on standard output. is_offline: of an LLM."""
    from rich.console import Console
    from rich.table import Table

    from evenflow.engine.opening import open_model, resolve_settings

    resolution = resolve_settings(config, open_model(config).model_config, is_offline=is_offline)
    table = Table("setting", "value", "why")
    for name, reason in resolution.reasons.items():
        table.add_row(name, str(getattr(resolution.settings, name)), reason)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return 0
