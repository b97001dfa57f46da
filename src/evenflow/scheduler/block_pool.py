"""Owns every KV block: reference counts, the free list, and which free blocks can still be found by their content."""

from collections import OrderedDict
from collections.abc import Iterable


class BlockPool:
    """num_blocks block ids. A block with no reference is free; it keeps its hash until it is handed out again.

    Free blocks are handed out in the order in which they were freed, so the least recently used content goes first.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._block_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._dirty: set[int] = set()
        self.num_cached = 0  # free blocks that can be found
        self.zero_block_ids: list[int] = []  # handed out since the caller last emptied it, and dirty

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks with one reference each; the caller has seen num_free. Their old content is forgotten."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            if block in self._hash_of:
                self.forget(block)
            self.references[block] = 1
            if block in self._dirty:
                self._dirty.remove(block)
                self.zero_block_ids.append(block)
        return blocks

    def acquire(self, block: int) -> None:
        """One more reference to a block that was found."""
        if self.references[block] == 0:
            del self._free[block]
            self.num_cached -= 1
        self.references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one reference of each. Those that become free are reused in this order."""
        for block in blocks:
            self.references[block] -= 1
            if self.references[block] == 0:
                self._free[block] = None
                self.num_cached += block in self._hash_of
            assert self.references[block] >= 0, f"block {block} released twice"

    def register(self, block: int, block_hash: bytes) -> bool:
        """Make a full block findable. False if another block already has this content."""
        if block_hash in self._block_of:
            return False
        self._block_of[block_hash] = block
        self._hash_of[block] = block_hash
        return True

    def find(self, block_hash: bytes) -> int | None:
        return self._block_of.get(block_hash)

    def forget(self, block: int) -> None:
        """The block's content is no longer what its hash says."""
        block_hash = self._hash_of.pop(block, None)
        if block_hash is not None:
            del self._block_of[block_hash]
            self.num_cached -= self.references[block] == 0

    def mark_dirty(self, blocks: Iterable[int]) -> None:
        """These may hold NaNs, which a masked read does not survive: they are zeroed when they are next handed out."""
        self._dirty.update(blocks)

    def check_invariants(self, held: dict[int, int]) -> None:
        """held: block -> number of block tables that hold it. Raises AssertionError."""
        for block in range(self.num_blocks):
            assert self.references[block] == held.get(block, 0), f"block {block} has the wrong reference count"
            assert (block in self._free) == (self.references[block] == 0), f"block {block} is held and free, or neither"
        assert {h: b for b, h in self._hash_of.items()} == self._block_of
        assert self.num_cached == sum(block in self._hash_of for block in self._free)
