"""An engine process in which the K-th call of SITE fails: `python faulty_engine.py SITE K ADDRESS PARENT_PID`."""

import sys
from itertools import count

from evenflow.engine import process
from evenflow.guided.matcher import GuidedDecoding
from evenflow.models import llama
from evenflow.runner.sampler import Sampler

SITES = {
    "forward": (llama.LlamaForCausalLM, "forward"),
    "sampler": (Sampler, "sample"),
    "masks": (GuidedDecoding, "masks"),
    "grammar": (GuidedDecoding, "_build"),
    "admit": (Sampler, "admit"),
    "build": (process, "build_engine"),
}


def plant(site: str, k: int) -> None:
    owner, name = SITES[site]
    original, calls = getattr(owner, name), count(1)

    def failing(*args, **kwargs):
        if next(calls) == k:
            raise RuntimeError(f"planted: call {k} of {site}")
        return original(*args, **kwargs)

    setattr(owner, name, failing)


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]))
    sys.exit(process.main(sys.argv[3:]))
