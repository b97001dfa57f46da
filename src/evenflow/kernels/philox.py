"""Random numbers as a pure function of (seed, position, vocabulary index): Philox4x32-10 and the noise made from it.

Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (2011). Bit-exact with Random123 and Triton's
tl.philox. 32-bit words are kept in int64 tensors, whose products wrap modulo 2**64 as they should.

The key is the request's 64-bit seed, low word first. The vocabulary is cut into tiles of 256; a counter serves four
indices of a tile, 64 apart, so that its four output words go to four contiguous runs:

    index i  ->  counter (i // 256 * 64 + i % 64, position, 0, 0), output word i // 64 % 4

Shapes: R rows, V vocabulary, K indices of a row.
"""

import torch
from torch import Tensor

LANE = 64  # indices that get the same output word of neighbouring counters
TILE = 4 * LANE

_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
_MOST = 1 - 2**-24  # the float32 below 1


def philox_4x32(
    c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds over the counter (c0..c3) and key (k0, k1), int64 words below 2**32 whose shapes broadcast.

    The first rounds are cheap where words are shared by a row or a column: their products have the small shapes.
    """
    shape = torch.broadcast_shapes(*(word.shape for word in (c0, c1, c2, c3, k0, k1)))
    for _ in range(3):
        high0, high1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = ((high1 >> 32) ^ c1 ^ k0) & _WORD, ((high0 >> 32) ^ c3 ^ k1) & _WORD
        c1, c3 = high1, high0  # the low words; what stands above them is masked with the next c0 and c2
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    c0, c1, c2, c3 = (word.expand(shape).contiguous() for word in (c0, c1, c2, c3))
    high0, high1 = torch.empty_like(c0), torch.empty_like(c0)
    for _ in range(7):
        torch.mul(c0, _MULTIPLIER_0, out=high0)
        torch.mul(c2, _MULTIPLIER_1, out=high1)
        torch.bitwise_right_shift(high1, 32, out=c0)
        c0.bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(_WORD)
        torch.bitwise_right_shift(high0, 32, out=c2)
        c2.bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(_WORD)
        c1, c3, high0, high1 = high1, high0, c1, c3
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def log_exponential_(words: Tensor) -> Tensor:
    """log E, in place, of random words given as float32: E = -log(1 - v), v = (word + 1/2) / 2**32 in (0, 1).

    The small E decide who wins: they have float32's full relative precision down to 2**-33. Gumbel noise, -log E, lies
    in [-2.82, 22.88].
    """
    v = words.add_(0.5).mul_(-(2.0**-32)).clamp_(min=-_MOST)
    return v.log1p_().neg_().log_()


def log_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """log E for every index of every row: [R, V] float32, rows strided. seeds, positions: [R] int64."""
    num_rows, num_tiles = len(seeds), -(-vocab_size // TILE)
    counters = torch.arange(num_tiles * LANE, device=seeds.device)
    words = philox_4x32(counters, *_row_words(seeds, positions))
    noise = torch.empty(num_rows, num_tiles, 4, LANE, device=seeds.device)
    for lane, word in enumerate(words):
        noise[:, :, lane] = word.view(num_rows, num_tiles, LANE)
    return log_exponential_(noise).view(num_rows, num_tiles * TILE)[:, :vocab_size]


def log_noise_at(seeds: Tensor, positions: Tensor, indices: Tensor) -> Tensor:
    """log_noise(seeds, positions, V).gather(1, indices) without the rest. indices: [R, K]; returns [R, K]."""
    counters = indices // TILE * LANE + indices % LANE
    words = torch.stack(philox_4x32(counters, *_row_words(seeds, positions)), -1)
    lanes = indices // LANE % 4
    return log_exponential_(words.gather(-1, lanes[..., None])[..., 0].float())


def _row_words(seeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """c1, c2, c3, k0, k1, one a row."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device=seeds.device)
    seeds = seeds[:, None]
    return positions[:, None], zero, zero, seeds & _WORD, (seeds >> 32) & _WORD
