"""The sampling parameters of running requests as one int32 table that lives on the device, a row a slot.

Owns the layout: which column holds what, and the packing on the host. Kernels find a row by its request's slot, so that
a step sends nothing. Real numbers are float32 and stand bit for bit in int32 words.
"""

import math

import numpy as np
import numpy.typing as npt

NUM_COLUMNS = 16  # 64 bytes: one row is one cache line's half or whole
TEMPERATURE = 0  # float32; 0 is greedy
TOP_K = 1  # 0 keeps all
TOP_P = 2  # float32; 1 keeps all
LOG_MIN_P = 3  # float32: log(min_p), -inf keeps all
REPETITION = 4  # float32; 1 is none
PRESENCE = 5  # float32; 0 is none
FREQUENCY = 6  # float32; 0 is none
SEED_LOW = 7  # the seed modulo 2**64, low word first
SEED_HIGH = 8
NUM_PROMPT_TOKENS = 9


def pack_params(
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    seed: int = 0,
    num_prompt_tokens: int = 0,
) -> npt.NDArray[np.int32]:
    """One row of the table: [NUM_COLUMNS] int32. The seed is taken modulo 2**64; greedy requests have temperature 0."""
    row = np.zeros(NUM_COLUMNS, dtype=np.int32)
    reals = row.view(np.float32)
    reals[TEMPERATURE] = temperature
    row[TOP_K] = top_k
    reals[TOP_P] = top_p
    reals[LOG_MIN_P] = math.log(min_p) if min_p > 0 else -math.inf
    reals[REPETITION], reals[PRESENCE], reals[FREQUENCY] = repetition, presence, frequency
    words = row.view(np.uint32)
    words[SEED_LOW], words[SEED_HIGH] = seed % 2**32, seed % 2**64 >> 32
    row[NUM_PROMPT_TOKENS] = num_prompt_tokens
    return row
