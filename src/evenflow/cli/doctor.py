"""Say what was found on this machine, what is wrong with it, and the command that mends it."""

import argparse

EXAMPLES = """examples:
  evenflow doctor

Exit code 0: nothing is wrong; 1: something is."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults()


def run(args: argparse.Namespace) -> int:
    from evenflow.doctor import checkup, collect

    facts = collect()
    for name, value in facts.lines():
        print(f"{name:14s} {value}")
    problems = checkup(facts)
    for problem in problems:
        print(f"\nPROBLEM  {problem.what}\n  mend it: {problem.fix}")
    if not problems:
        print("\nnothing is wrong")
    return 1 if problems else 0
