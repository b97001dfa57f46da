"""From the start of a process until it answers, by phase: the command line, the engine, the server.

Every run is a new process. The first of each is reported apart: it fills the file cache.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from evenflow.bench import engines
from evenflow.bench.server_process import ServerProcess
from evenflow.progress import Bar

ENGINE_CHILD = """
import json, sys, time
marks = [("interpreter", time.time())]
options = json.loads(sys.stdin.read())
import torch
marks.append(("import torch", time.time()))
from evenflow import LLM, SamplingParams, EngineConfig
from evenflow.engine.opening import open_model
import evenflow.engine.building
marks.append(("import evenflow", time.time()))
open_model(EngineConfig(**options))
marks.append(("config and tokenizer", time.time()))
llm = LLM(**options)
marks.append(("weights, KV cache, warm-up", time.time()))
llm.generate([[17, 18, 19]], SamplingParams(max_tokens=1, ignore_eos=True), use_tqdm=False)
marks.append(("first token", time.time()))
print(json.dumps(marks))
"""
COMMANDS = {"evenflow --help": ["--help"], "evenflow --version": ["--version"]}
TIMEOUT_S = 1800


def bench_startup(model: str, options: dict[str, Any], *, repeats: int = 3, is_shown: bool = True) -> dict[str, Any]:
    """Seconds of every phase. Raises ValueError with the child's words when it fails."""
    if repeats < 1:
        raise ValueError(f"--repeats {repeats} must be at least 1")
    settings = engines.engine_options(model, dict(options))
    parts = {
        **{name: _command(args) for name, args in COMMANDS.items()},
        "engine": lambda: engine_phases(settings),
        "server": lambda: server_phases(settings),
    }
    found: dict[str, Any] = {}
    with Bar("processes", len(parts) * (repeats + 1), is_shown=is_shown) as bar:
        for name, measure in parts.items():
            runs = []
            for _ in range(repeats + 1):
                runs.append(measure())
                bar.advance(f"{name}: {sum(runs[-1].values()):.2f} s")
            found[name] = summary(runs)
    return {"kind": "startup", "model_id": model, "parts": found}


def summary(runs: Sequence[dict[str, float]]) -> dict[str, Any]:
    """The first run apart, then the median of each phase over the others."""
    warm = runs[1:]
    phases = {phase: statistics.median(run[phase] for run in warm) for phase in warm[0]}
    return {
        "phases_s": phases,
        "total_s": statistics.median(sum(run.values()) for run in warm),
        "first_run_s": sum(runs[0].values()),
        "runs": list(runs),
    }


def _command(args: list[str]) -> Any:
    def measure() -> dict[str, float]:
        start = time.time()
        _run([sys.executable, "-m", "evenflow", *args], "")
        return {"answer": time.time() - start}

    return measure


def engine_phases(options: dict[str, Any]) -> dict[str, float]:
    """Seconds of each phase until LLM has made a token, from the start of its process."""
    start = time.time()
    answer = _run([sys.executable, "-c", ENGINE_CHILD], json.dumps(options))
    marks = json.loads(answer.splitlines()[-1])
    phases, last = {}, start
    for name, at in marks:
        phases[name], last = at - last, at
    return phases


def server_phases(options: dict[str, Any]) -> dict[str, float]:
    """Seconds until `evenflow serve` says that it is ready."""
    start = time.time()
    with ServerProcess(options):
        return {"ready": time.time() - start}


def _run(command: list[str], text: str) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=TIMEOUT_S, env=os.environ)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ValueError(f"the process ended with {done.returncode}: {lines[-1] if lines else 'no message'}")
    return done.stdout
