"""Ranks without an engine process: each runs its own scheduler over the same requests, and prints what it generated.

`python ranks.py tokens RANK SIZE ADDRESS DIRECTORY...`: one JSON list, of every checkpoint the tokens of every request.
`python ranks.py device ...`: the same of a GPU's runner, on a device that is late, with graphs and steps in flight.
`python ranks.py sum RANK SIZE ADDRESS DEADLINE_S`: joins, and prints the sum of the ranks' numbers.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from lazy_stream import LazyStream

from evenflow.config import EngineConfig
from evenflow.distributed import RendezvousError, TensorParallel, join, leave
from evenflow.engine.engine import Engine
from evenflow.engine.opening import open_model, resolve_settings
from evenflow.request import Request
from evenflow.runner.device_runner import DeviceRunner
from evenflow.runner.model_runner import ModelRunner
from evenflow.sampling_params import SamplingParams
from evenflow.scheduler import Scheduler

CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(temperature=0, max_tokens=10),
    SamplingParams(temperature=0, max_tokens=8, repetition_penalty=1.3),
    SamplingParams(seed=1, max_tokens=8, top_p=0.9),
    SamplingParams(seed=2, max_tokens=8, logprobs=2, prompt_logprobs=1),
]
PROMPTS = ((0, 40), (1, 30), (0, 40), (1, 17))  # which text, and how much of it


def generate(directory: Path, tp: TensorParallel | None = None, **device_settings: bool) -> list[list[int]]:
    """Tokens of requests that share beginnings, in a cache that is too small for all of them, in chunks.

    device_settings: changes to the settings, for the runner of a device; without, the CPU's runs.
    """
    config = EngineConfig(
        model=str(directory),
        skip_tokenizer_init=True,
        tensor_parallel_size=tp.size if tp else 1,
        device="cpu",
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=64,
    )
    opened = open_model(config)
    settings = resolve_settings(config, opened.model_config).settings
    if device_settings:
        settings = replace(settings, **device_settings)
        runner = DeviceRunner(settings, opened.model_config, directory, tp, LazyStream())
    else:
        runner = ModelRunner(settings, opened.model_config, directory, tp)
    scheduler = Scheduler(
        num_blocks=17,
        block_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=24,
        max_model_len=64,
        enable_prefix_caching=True,
        enable_chunked_prefill=True,
    )
    engine = Engine(scheduler, runner)
    vocab_size = opened.model_config.vocab_size
    texts = np.random.default_rng(3).integers(0, vocab_size, (2, 40)).tolist()
    requests = [
        Request(str(i), texts[text][:length], params, max_tokens=params.max_tokens or 1)
        for i, ((text, length), params) in enumerate(zip(PROMPTS, PARAMS, strict=True))
    ]
    for request in requests:
        engine.add(request)
    while engine.has_unfinished:
        for delta in engine.step():
            assert delta.error is None, delta.error
    assert scheduler.num_preemptions > 0
    assert scheduler.num_prefix_hits > 0
    assert not device_settings or runner.graphs.num_replays > 0
    return [request.token_ids[request.num_prompt_tokens :] for request in requests]


def start(
    command: list[str],
    rank: int,
    size: int,
    address: str,
    *args: str,
    prefix: tuple[str, ...] = (),
    file: str = __file__,
):
    """One rank as a process, its outputs piped."""
    return subprocess.Popen(
        [*prefix, sys.executable, file, *command, str(rank), str(size), address, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def main(mode: str, rank: str, size: str, address: str, *args: str) -> int:
    torch.set_num_threads(1)
    deadline_s = float(args[0]) if mode == "sum" else 60.0
    try:
        tp = join(int(rank), int(size), address, CPU, deadline_s=deadline_s)
    except (RendezvousError, ValueError) as error:
        print(error)
        return 3
    if mode == "sum":
        print(tp.all_reduce(torch.tensor([float(rank) + 1])).item(), tp.minimum(int(rank) + 5))
    else:
        device_settings = {"enable_overlap": True, "enable_graphs": True} if mode == "device" else {}
        print(json.dumps([generate(Path(path), tp, **device_settings) for path in args]))
    leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
