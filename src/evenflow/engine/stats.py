"""What the engine tells about itself: a snapshot that travels with every step, and a map of the blocks. No torch.

Owns the shapes only. Who counts is the scheduler and the engine; who turns totals into metrics is the server.
"""

import msgspec
import numpy as np

from evenflow.scheduler.block_pool import BlockPool


class EngineStats(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One snapshot, after a step. "Total" means since the engine process started; such a field never falls."""

    num_running: int
    num_waiting: int
    num_blocks: int
    block_size: int  # tokens
    num_used_blocks: int  # held by requests
    num_cached_blocks: int  # free, but their content can still be found
    num_steps: int  # total
    step_time_s: float  # total over all steps
    num_computed_tokens: int  # total that steps computed: prompts, outputs, and what was recomputed after preemption
    num_output_tokens: int  # total sampled
    num_preemptions: int  # total
    num_prefix_queries: int  # total prompt tokens looked up in the prefix cache
    num_prefix_hits: int  # total prompt tokens found there
    num_failed_rows: int  # total rows that failed alone, as with NaN logits


def block_map(pool: BlockPool, max_cells: int) -> tuple[int, str]:
    """The pool as (blocks_per_cell, one character per cell), at most `max_cells` cells in the order of block ids.

    '0' free, '1' free but findable, '2' held by one request, '3' shared by several. A cell of several blocks shows the
    highest of them; the last cell may stand for fewer blocks.
    """
    if max_cells < 1:
        raise ValueError(f"max_cells is {max_cells}; a map needs at least 1")
    blocks_per_cell = max(1, -(-pool.num_blocks // max_cells))
    references = np.array(pool.references, dtype=np.int64)
    findable = np.fromiter(pool._hash_of, dtype=np.int64, count=len(pool._hash_of))
    states = np.zeros(-(-pool.num_blocks // blocks_per_cell) * blocks_per_cell, dtype=np.uint8)
    states[findable] = 1
    held = np.flatnonzero(references)
    states[held] = np.where(references[held] > 1, 3, 2)
    cells = states.reshape(-1, blocks_per_cell).max(axis=1)
    return blocks_per_cell, (cells + ord("0")).tobytes().decode("ascii")
