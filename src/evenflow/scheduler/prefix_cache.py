"""The name of a block's content: a hash chained over everything before it, so that equal names mean equal prefixes."""

from array import array
from hashlib import blake2b

from evenflow.request import Request

DIGEST_BYTES = 32  # wide enough that nobody finds two prefixes of one name


def root_hash(cache_salt: str) -> bytes:
    """What the first block's name is chained on: requests share blocks only with requests of the same salt."""
    return blake2b(cache_salt.encode(), digest_size=DIGEST_BYTES, person=b"evenflow").digest()


def block_hash(parent: bytes, token_ids: list[int]) -> bytes:
    return blake2b(parent + array("I", token_ids).tobytes(), digest_size=DIGEST_BYTES).digest()


def extend_block_hashes(request: Request, block_size: int) -> list[bytes]:
    """The names of all full blocks of the request's known tokens; only the new ones are computed."""
    hashes = request.block_hashes
    for index in range(len(hashes), len(request.token_ids) // block_size):
        parent = hashes[-1] if hashes else root_hash(request.cache_salt)
        hashes.append(block_hash(parent, request.token_ids[index * block_size : (index + 1) * block_size]))
    return hashes
