"""Complete one or more prompts. The text goes to standard output, everything else to standard error."""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evenflow.cli.options import add_engine_options, add_sampling_options, engine_config, explain, given

if TYPE_CHECKING:
    from evenflow.llm import LLM
    from evenflow.request import RequestOutput
    from evenflow.sampling_params import SamplingParams

EXAMPLES = """examples:
  evenflow generate "Once upon a time"
  evenflow generate --temperature 0 --max-tokens 50 "There was once a fox" "The king said"
  evenflow generate --prompts-file prompts.txt --json > completions.jsonl
  echo "Once upon a time" | evenflow generate -
  evenflow generate --model ./my-model --explain"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompts", nargs="*", metavar="PROMPT", help="'-' reads one prompt from standard input")
    parser.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    parser.add_argument("--json", action="store_true", help="one JSON object per completion and line")
    parser.add_argument("--verbose", action="store_true", help="also say what the memory goes to")
    add_sampling_options(parser)
    add_engine_options(parser, leave_out=("seed",))  # --seed is the request's


def run(args: argparse.Namespace) -> int:
    if args.explain:
        return explain(engine_config(args), is_offline=True)
    prompts = read_prompts(args)
    config, wanted = engine_config(args), given(args, "sampling_")
    llm = open_llm(config.model, {k: v for k, v in given(args, "engine_").items() if k != "model"}, args.verbose)
    params = llm.default_sampling_params().replace(**wanted)
    if len(prompts) == 1 and params.n == 1 and not args.json:
        return stream_one(llm, prompts[0], params)
    start_s = time.perf_counter()
    outputs = llm.generate(list(prompts), params)
    elapsed_s = time.perf_counter() - start_s
    for output in outputs:
        print_output(output, args.json)
    num_tokens = sum(len(completion.token_ids) for output in outputs for completion in output.outputs)
    say(f"[{num_tokens} tokens in {elapsed_s:.2f} s, {num_tokens / elapsed_s:.0f} tokens/s]")
    return 1 if any(completion.error for output in outputs for completion in output.outputs) else 0


def read_prompts(args: argparse.Namespace) -> list[str]:
    prompts = [sys.stdin.read().rstrip("\n") if prompt == "-" else prompt for prompt in args.prompts]
    if args.prompts_file is not None:
        try:
            lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts-file {args.prompts_file} cannot be read: {error}") from None
        prompts += [line for line in lines if line.strip()]
    if not prompts:
        raise ValueError('no prompt; try: evenflow generate "Once upon a time"')
    return prompts


def open_llm(model: str, options: dict[str, object], is_verbose: bool) -> "LLM":
    """Load the model, with a sign of life on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        from evenflow.llm import LLM

        llm = LLM(model, **options)
    if is_verbose:
        say(llm.memory_account)
    return llm


def stream_one(llm: "LLM", prompt: str, params: "SamplingParams") -> int:
    """Print the prompt and its completion as it comes, then how fast it was."""
    print(prompt, end="", flush=True)
    return follow(llm.stream(prompt, params))


def follow(outputs: Iterator["RequestOutput"]) -> int:
    """Print a stream's text as it comes, then on standard error how fast it was."""
    start_s = time.perf_counter()
    first_s, num_printed, error = 0.0, 0, None
    completion = None
    for output in outputs:
        completion = output.outputs[0]
        first_s = first_s or time.perf_counter() - start_s
        print(completion.text[num_printed:], end="", flush=True)
        num_printed, error = len(completion.text), completion.error
    print(flush=True)
    elapsed_s = time.perf_counter() - start_s
    if error is not None:
        say(f"evenflow: error: {error}")
        return 1
    num_tokens = len(completion.token_ids) if completion else 0
    say(
        f"[{num_tokens} tokens in {elapsed_s:.2f} s, {num_tokens / elapsed_s:.0f} tokens/s, "
        f"first token after {1000 * first_s:.0f} ms]"
    )
    return 0


def print_output(output: "RequestOutput", as_json: bool) -> None:
    for completion in output.outputs:
        if as_json:
            import json

            record = {"prompt": output.prompt, "index": completion.index, "text": completion.text}
            record |= {"finish_reason": completion.finish_reason, "num_tokens": len(completion.token_ids)}
            print(json.dumps(record | ({"error": completion.error} if completion.error else {}), ensure_ascii=False))
        elif completion.error:
            say(f"evenflow: error: {output.prompt!r:.60}: {completion.error}")
        else:
            print(f"{output.prompt}{completion.text}\n")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
