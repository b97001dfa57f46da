"""How many threads of a CPU a step is worth.

Every parallel operation ends at a barrier. A step of a small model is hundreds of operations of microseconds; when
another program holds a core, each barrier waits for the operating system: 4 sequences of the demo model took 507 ms a
step with 2 threads beside a busy process, and 8 ms with 1. On an idle machine 2 threads first win at 16 sequences (8.6
against 10.2 ms).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SERIAL_FLOPS = 150e6
SERIAL_BYTES = 64e6


def is_small(num_tokens: int, num_parameters: int, num_bytes: int) -> bool:
    """Whether one thread does a step of so many tokens, which reads so many bytes of weights and cache, as fast."""
    return 2 * num_tokens * num_parameters < SERIAL_FLOPS and num_bytes < SERIAL_BYTES


@contextmanager
def one_thread_if(is_small_step: bool) -> Iterator[None]:
    """PyTorch's number of threads is the process's; it is as before when the step is over."""
    num_threads = torch.get_num_threads()
    if not is_small_step or num_threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
