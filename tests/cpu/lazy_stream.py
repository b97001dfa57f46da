"""A device that computes nothing before somebody waits: what the host does too early or too late becomes a wrong token.

Runs on the CPU with the kernels' references. Work that was submitted runs at `wait`, in order, up to the mark. A graph
replays what was recorded, on the same tensors. Memory is poisoned where a real device would leave it undefined.
"""

from collections import deque

import torch


class RecordedGraph:
    def __init__(self, work, result):
        self.work, self.result = work, result

    def replay(self):
        self.result.copy_(self.work())


class LazyStream:
    """The Stream protocol of runner/stream.py."""

    supports_graphs = True

    def __init__(self):
        self.device = torch.device("cpu")
        self.queue = deque()
        self.num_submitted = self.num_done = 0
        self.most_waiting = 0
        self.pinned_tensors = []

    def submit(self, work):
        self.queue.append(work)
        self.num_submitted += 1
        self.most_waiting = max(self.most_waiting, len(self.queue))

    def mark(self):
        return self.num_submitted

    def wait(self, mark):
        while self.num_done < mark:
            work = self.queue.popleft()
            self.num_done += 1
            work()

    def pinned(self, *shape, dtype=torch.int32):
        return torch.full(shape, -(2**30), dtype=dtype)

    def capture(self, work):
        """Recording runs nothing that counts: the result is garbage until the first replay."""
        with torch.inference_mode():
            result = torch.full_like(work(), float("nan"))
        return RecordedGraph(work, result), result
