"""The command line: evenflow generate, chat, serve, bench, parity, plan, crosscheck, doctor.

Answers --help, --version and wrong usage without torch; each command imports what it needs when it runs.
Exit codes: 0 done, 1 something failed, 2 bad input, 3 a plan that does not fit, 130 interrupted.
"""

import argparse
import difflib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn

from evenflow import __version__

COMMANDS = {
    "generate": "complete a prompt",
    "chat": "talk with a model",
    "serve": "serve it over the OpenAI API, with a page to look at",
    "bench": "measure, beside the physical limit",
    "parity": "does another machine compute the same?",
    "plan": "does a model fit a GPU, and how fast can it be?",
    "crosscheck": "check the GPU kernels, for every architecture, without a GPU",
    "doctor": "what is on this machine, and what is wrong with it",
}
EXAMPLES = """examples:
  evenflow generate "Once upon a time"
  evenflow chat
  evenflow serve
  evenflow bench throughput
  evenflow plan llama-2-70b --gpu mi210 --gpus 4
  evenflow crosscheck compile
  evenflow doctor

`evenflow COMMAND --help` says more. Without --model, the built-in demo model is used."""


class Parser(argparse.ArgumentParser):
    """argparse with our form of error: one line that says what is wrong and what was meant."""

    def error(self, message: str) -> NoReturn:
        sys.stderr.write(f"evenflow: error: {message} (see: {self.prog} --help)\n")
        sys.exit(2)

    def nearest(self, wrong: str) -> str:
        """'; did you mean --max-num-seqs?' for a wrong option, or nothing."""
        wrong = wrong.split("=")[0]
        known = {option for option in self.known_options() if option.startswith("--")}
        if wrong in known:
            return ", which another kind of it takes"
        near = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
        return f"; did you mean {near[0]}?" if near else ""

    def known_options(self) -> list[str]:
        """Of this parser and of its subcommands."""
        found: list[str] = []
        for action in self._actions:
            found += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                found += [option for parser in set(action.choices.values()) for option in parser.known_options()]
        return found


def make_parser(command: str | None) -> tuple[Parser, Parser | None]:
    """The parser, and that of `command`. Only this one is filled: the others cost imports."""
    parser = Parser(
        prog="evenflow",
        description="LLM inference with continuous batching and paged attention, on whatever machine there is.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"evenflow {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    chosen = None
    for name, text in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=text)
            continue
        module = import_module(f"evenflow.cli.{name}")
        chosen = commands.add_parser(
            name,
            help=text,
            description=module.__doc__,
            epilog=module.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser, chosen


def parse(argv: list[str]) -> argparse.Namespace:
    command = next((arg for arg in argv if not arg.startswith("-")), None)
    parser, chosen = make_parser(command)
    if command is not None and chosen is None:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        parser.error(f"unknown command {command!r}{hint} Commands are {', '.join(COMMANDS)}")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        kind = "option" if unknown[0].startswith("-") else "argument"
        at_fault = chosen or parser
        at_fault.error(f"unknown {kind} {unknown[0]}{at_fault.nearest(unknown[0])}")
    if chosen is None:
        parser.print_help()
        sys.exit(0)
    return args


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)
        run: Callable[[argparse.Namespace], int] = args.run
        return run(args)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `evenflow ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        sys.stderr.write(f"evenflow: error: {error}\n")
        return 2
