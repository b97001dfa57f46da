"""Keeps Python's garbage collector from walking through what stays for the whole of a run.

torch and Triton are some 400,000 objects. A full collection walks all of them, for 0.1 to 0.2 s, in which no step is
launched and no token is sent.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

FEW_OBJECTS = 10_000  # that Python froze itself: 3.12 does so with some hundreds at its start


@contextmanager
def only_new_objects() -> Iterator[None]:
    """Within, collections look at what was made within; afterwards at everything again.

    Changes nothing where objects are frozen already, by the program around us or an outer use.
    """
    if gc.get_freeze_count() > FEW_OBJECTS:
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
