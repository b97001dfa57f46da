"""The engine's snapshot on the wire, and the map of the blocks against a loop over them."""

import random

import msgspec
import pytest

from evenflow.engine.stats import EngineStats, block_map
from evenflow.scheduler.block_pool import BlockPool


def test_a_snapshot_travels_as_an_array():
    snapshot = EngineStats(2, 1, 100, 16, 40, 10, 7, 0.5, 24, 5, 2, 64, 32, 1)
    packed = msgspec.msgpack.encode(snapshot)
    assert msgspec.msgpack.decode(packed) == [2, 1, 100, 16, 40, 10, 7, 0.5, 24, 5, 2, 64, 32, 1]
    assert msgspec.msgpack.decode(packed, type=EngineStats) == snapshot


@pytest.mark.parametrize(("num_blocks", "max_cells"), [(1, 1), (7, 7), (7, 100), (100, 33), (101, 10), (64, 1)])
def test_block_map_against_a_loop(num_blocks, max_cells):
    rng = random.Random(num_blocks * max_cells)
    pool = BlockPool(num_blocks)
    blocks = pool.allocate(rng.randrange(num_blocks + 1))
    hashes = {block: block.to_bytes(32, "little") for block in blocks if rng.random() < 0.6}
    for block, block_hash in hashes.items():
        assert pool.register(block, block_hash)
    for block in blocks:
        if rng.random() < 0.5:
            pool.release([block])
        elif rng.random() < 0.5:
            pool.acquire(block)

    def state(block):
        findable = block in hashes and pool.find(hashes[block]) == block
        return min(pool.references[block], 2) + 1 if pool.references[block] else int(findable)

    per_cell, cells = block_map(pool, max_cells)
    starts = range(0, num_blocks, per_cell)
    assert cells == "".join(str(max(state(b) for b in range(num_blocks)[i : i + per_cell])) for i in starts)
    assert len(cells) <= max_cells
    assert per_cell == 1 or -(-num_blocks // (per_cell - 1)) > max_cells  # no coarser than it must be


def test_block_map_shows_all_four_states():
    pool = BlockPool(4)
    _, cached, held, shared = pool.allocate(4)
    for block in (cached, held, shared):
        pool.register(block, bytes([block]))
    pool.acquire(shared)
    pool.release([0, cached])
    assert block_map(pool, 4) == (1, "0123")
    assert block_map(pool, 2) == (2, "13")
    assert block_map(BlockPool(0), 5) == (1, "")
    with pytest.raises(ValueError, match="max_cells is 0"):
        block_map(pool, 0)
