"""What a test runs in a process of its own: `python child.py MODE JSON`. Prints one line of JSON at the end.

generate: {"runs": [options of LLM], "prompts": ..., "params": ...}; of each run what was generated and how.
fail: {"options": ..., "signal_name": "SIGKILL"}: sends that to rank 1 in the middle; the error, and how long it took.
"""

import json
import os
import signal
import sys
import threading
import time

from evenflow import LLM, SamplingParams
from evenflow.engine.rank_error import RankError


def say(text: str) -> None:
    print(f"[{time.perf_counter() - START_S:6.1f} s] {text}", file=sys.stderr, flush=True)


def generate(runs: list[dict], prompts: list[list[int]], params: list[dict]) -> list[dict]:
    found = []
    for options in runs:
        say(f"starting {options}")
        llm = LLM(skip_tokenizer_init=True, device="cuda", **options)
        say(f"{llm.memory_account}; {llm.kernel_account}")
        requests = [SamplingParams(**each, detokenize=False) for each in params]
        turns = []
        for _ in range(3):  # a size is recorded when it comes the second time
            outputs = llm.generate(prompts, requests, use_tqdm=False)
            turns.append([completion.token_ids for output in outputs for completion in output.outputs])
        if options["dtype"] == "float32":
            assert turns[0] == turns[1] == turns[2], "the same requests gave other tokens"
        runner = llm.engine.runner
        if options.get("tensor_parallel_size", 1) > 1:
            runner.check_ranks_agree()
        rank_0 = getattr(runner, "rank_0", runner)
        found.append(
            {
                "tokens": turns[-1],
                "logprobs": [
                    [entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], prompt[1:], strict=True)]
                    for output, prompt in zip(outputs, prompts, strict=True)
                    if output.prompt_logprobs
                ],
                "num_replays": rank_0.graphs.num_replays,
                "account": llm.kernel_account,
            }
        )
        say("closing")
        llm.close()
        say("closed")
    return found


def fail(options: dict, signal_name: str) -> dict:
    """After the first steps, so that graphs are being replayed."""
    llm = LLM(skip_tokenizer_init=True, device="cuda", **options)
    say(f"ready; {llm.kernel_account}")
    pids = llm.engine.runner.ranks.pids()
    params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True, detokenize=False)
    prompts = [[5 + i, 6, 7] for i in range(8)]
    llm.generate(prompts, params, use_tqdm=False)
    failed_s: list[float] = []

    def do_it() -> None:
        failed_s.append(time.perf_counter())
        os.kill(pids[0], getattr(signal, signal_name))

    threading.Timer(0.3, do_it).start()
    try:
        while True:
            llm.generate(prompts, params, use_tqdm=False)
    except RankError as error:
        message, took_s = str(error), time.perf_counter() - failed_s[0]
    say(f"{message!r} after {took_s:.2f} s")
    llm.close()
    closed_s = time.perf_counter() - failed_s[0]
    say(f"closed after {closed_s:.2f} s")
    return {"error": message, "took_s": took_s, "closed_s": closed_s, "alive": [pid for pid in pids if is_alive(pid)]}


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    START_S = time.perf_counter()
    arguments = json.loads(sys.argv[2])
    print(json.dumps({"generate": generate, "fail": fail}[sys.argv[1]](**arguments)), flush=True)
    say("done")
    os._exit(0)  # whatever a library still waits for is not what is tested here
