"""Certify that another machine, type, version or engine computes the same: record here, check there."""

import argparse
import json
from pathlib import Path
from typing import Any

from evenflow.cli.options import add_engine_options, given

EXAMPLES = """examples:
  evenflow parity record demo demo.json
  evenflow parity record ./llama-2-7b certificate.json --prompts prompts.txt --max-tokens 64
  evenflow parity check certificate.json                         # this machine, the same model
  evenflow parity check certificate.json --dtype bfloat16
  evenflow parity check certificate.json --base-url http://mi300:8000   # any server with logprobs of prompts

Exit code 0: within the bounds; 1: not; 2: bad input."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    record = actions.add_parser("record", help="make a certificate of this engine", epilog=EXAMPLES, **shape)
    record.add_argument("model", metavar="MODEL", help="directory, Hugging Face name, demo, or a shape of `plan`")
    record.add_argument("certificate", type=Path, metavar="FILE", help="JSON to write")
    record.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line (default: 16 of ours)")
    record.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="greedy tokens per prompt (%(default)s)"
    )
    record.add_argument("--top-k", type=int, default=10, metavar="K", help="best tokens per position (%(default)s)")
    add_engine_options(record, leave_out=("model",), has_explain=False)
    record.set_defaults(run_action=_run_record)
    check = actions.add_parser("check", help="hold an engine or a server to a certificate", epilog=EXAMPLES, **shape)
    check.add_argument("certificate", type=Path, metavar="FILE", help="JSON of `parity record`")
    check.add_argument(
        "--model", metavar="MODEL", help="model to check (default: the certificate's, the server's first)"
    )
    check.add_argument("--base-url", metavar="URL", help="check a server instead of this engine")
    check.add_argument("--api-key", metavar="KEY", help="sent to the server as bearer token")
    _add_bounds(check)
    check.add_argument("--output", type=Path, metavar="FILE", help="write the verdict as JSON")
    add_engine_options(check, leave_out=("model",), has_explain=False)
    check.set_defaults(run_action=_run_check)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    from evenflow.parity.comparing import Bounds

    default = Bounds()
    group = parser.add_argument_group("bounds, in natural logarithms of probability")
    group.add_argument(
        "--min-top1",
        type=float,
        default=default.min_top1,
        metavar="X",
        help="agreement, near ties left out (%(default)s)",
    )
    group.add_argument("--max-mean-gap", type=float, default=default.max_mean_gap, metavar="X", help="(%(default)s)")
    group.add_argument("--max-gap", type=float, default=default.max_gap, metavar="X", help="(%(default)s)")
    group.add_argument(
        "--near-tie", type=float, default=default.near_tie, metavar="X", help="best over second, at most (%(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    return int(args.run_action(args))


def _run_record(args: argparse.Namespace) -> int:
    from evenflow.parity import engine

    prompts = engine.PROMPTS if args.prompts is None else engine.read_prompts(args.prompts)
    certificate = engine.record(
        args.model, given(args, "engine_"), prompts=prompts, max_tokens=args.max_tokens, top_k=args.top_k
    )
    certificate.save(args.certificate)
    num_positions = sum(len(sequence.positions) for sequence in certificate.sequences)
    print(f"written: {args.certificate}, {len(certificate.sequences)} prompts, {num_positions} positions")
    return 0


def _run_check(args: argparse.Namespace) -> int:
    from evenflow.parity import certificate as certificates
    from evenflow.parity.comparing import Bounds, compare

    bounds = Bounds(args.min_top1, args.max_mean_gap, args.max_gap, args.near_tie)
    certificate = certificates.load(args.certificate)
    generated = None
    if args.base_url is not None:
        from evenflow.parity import remote

        forced, about = remote.check(certificate, args.base_url, args.model, args.api_key)
    else:
        from evenflow.parity import engine

        forced, generated, about = engine.check(certificate, args.model, given(args, "engine_"))
    verdict = compare(certificate, forced, bounds, generated)
    _print(certificate.about, about, verdict.as_dict())
    if args.output is not None:
        record = {"certificate": certificate.about, "checked": about, "bounds": vars_of(bounds), **verdict.as_dict()}
        args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if verdict.passed else 1


def vars_of(bounds: Any) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(bounds)


def _print(recorded: dict[str, Any], checked: dict[str, Any], verdict: dict[str, Any]) -> None:
    for name, about in (("recorded", recorded), ("checked", checked)):
        words = [f"{key} {value}" for key, value in about.items() if key not in ("versions", "date", "warning")]
        print(f"{name:20s} {', '.join(words)}")
    if "warning" in checked:
        print(f"{'warning':20s} {checked['warning']}")
    print(f"{'positions':20s} {verdict['num_compared']}, near ties {verdict['num_near_ties']}")
    print(f"{'top-1 agreement':20s} {verdict['top1']:.4f}; near ties left out {verdict['top1_clear']:.4f}")
    print(
        f"{'logprob gap':20s} mean {verdict['mean_gap']:.3g}, greatest {verdict['max_gap']:.3g} at {verdict['worst']}"
    )
    divergence = verdict["first_divergence"]
    where = "none" if divergence is None else f"prompt {divergence[0]}, token {divergence[1]}"
    print(f"{'first divergence':20s} {where}; {verdict['num_diverged']} sequences differ")
    for failure in verdict["failures"]:
        print(f"{'FAILED':20s} {failure}")
    if not verdict["failures"]:
        print("passed")
