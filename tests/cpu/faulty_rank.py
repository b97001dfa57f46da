"""A rank in which the K-th step goes wrong: `python faulty_rank.py FAULT K PLANS_FD CONTROL_FD PARENT_PID`."""

import os
import sys
import threading
from itertools import count

from evenflow.engine import worker
from evenflow.models import llama


def plant(fault: str, k: int) -> None:
    original, calls = llama.LlamaForCausalLM.forward, count(1)

    def failing(self, *args, **kwargs):
        if next(calls) == k:
            if fault == "memory":
                raise MemoryError("planted")
            if fault == "error":
                raise RuntimeError("planted")
            threading.Event().wait()  # "hang"
        hidden = original(self, *args, **kwargs)
        return -hidden if fault == "other tokens" else hidden

    llama.LlamaForCausalLM.forward = failing


if __name__ == "__main__":
    if sys.argv[1] == "exit":
        os._exit(int(sys.argv[2]))
    if sys.argv[1] == "file":
        worker.make_runner = None  # not reached
        worker.join = lambda *args, **kwargs: (_ for _ in ()).throw(ValueError("model.safetensors is broken"))
    plant(sys.argv[1], int(sys.argv[2]))
    sys.exit(worker.main(sys.argv[3:]))
