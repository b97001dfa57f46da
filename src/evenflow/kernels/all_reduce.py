"""All-reduce over peer memory, fused with what follows it: the residual addition and the norm.

    s = residual + sum over ranks of x        out = rms_norm(s) * weight        x, residual, s, out: [N, D]

The sum is accumulated in float32, in the order of the ranks, and rounded to x's type before the residual is added, so
that all ranks have the same bits. Every rank has a buffer that all can read (PeerBuffers). Two ways:

- one-shot: a program copies a tile of rows into its rank's buffer, tells the peers, waits for their same tile, and sums
  all. Every rank reads (P - 1) messages; one exchange of flags. For small messages, where latency is all.
- two-shot: a program copies P tiles, waits, sums the one tile of them that is its rank's, and puts the sum into its
  buffer; after a second exchange it reads the other P - 1 sums. Every rank reads 2 (P - 1) / P messages.

Only plain loads, stores and atomics: no multicast, no multimem instruction.

The flags. Each launch has a number, its epoch, counted on the device (`state`), so that a graph can replay it. In each
rank's buffer flag [phase, program, peer] holds the last epoch that the peer's program has reached; that peer writes it
(release), its owner polls it (acquire). Two halves of the data are used in turn: in epoch e a rank writes the half of
epoch e - 2 again, when all peers have begun epoch e - 1, hence ended e - 2.

A wait ends when the host says so (`PeerBuffers.abort`, for those whose peers are dead) or after MAX_POLLS, minutes.
What it waited for counts as NaN: a dead peer gives an error in every row, not wrong text, and no kernel runs for ever.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from evenflow.kernels.language import cdiv, jit, next_power_of_2, tl
from evenflow.kernels.rms_norm import add_rms_norm

SIZES = (2, 4, 8)
MAX_PROGRAMS = 512
MAX_BYTES = 8 * 2**20  # of one message; larger ones are the library's
# Up to so many bytes one-shot is the faster, by number of ranks. With 2 ranks both read the same amount: on two H200 it
# always won. Not measured here: with 4 it won up to 2 MiB (vLLM pull request 24111); with 8 the amount read limits it.
ONE_SHOT_MAX_BYTES = {2: 8 * 2**20, 4: 2 * 2**20, 8: 512 * 2**10}
MAX_POLLS = 1 << 28  # a peer may be compiling
POLLS_PER_LOOK = 64  # between two looks at the host's word
FLAG_BYTES = 2 * MAX_PROGRAMS * max(SIZES) * 8
BUFFER_BYTES = FLAG_BYTES + 4 * MAX_BYTES  # two halves of messages and two of sums


@dataclass(slots=True)
class PeerBuffers:
    """One rank's view of everybody's buffer of BUFFER_BYTES: first the flags, zeroed before anybody's first launch.

    pointers: [size] int64 on the device, the buffers' addresses as this rank sees them. state: [3] int64 zeros on the
    device: the epoch, the number of programs that have ended, and whether to wait no more. owner: whatever keeps the
    memory alive. max_polls: before a peer counts as dead.
    """

    rank: int
    size: int
    pointers: Tensor
    state: Tensor
    owner: object = None
    max_polls: int = MAX_POLLS
    _one: Tensor = field(init=False)
    _side_stream: "torch.cuda.Stream | None" = field(init=False)

    def __post_init__(self) -> None:
        is_cuda = self.state.is_cuda
        self._one = torch.ones(1, dtype=torch.int64, pin_memory=is_cuda)
        self._side_stream = torch.cuda.Stream(self.state.device) if is_cuda else None

    def abort(self) -> None:
        """End the waits of this rank's kernels, now and ever after; from any thread, while they run."""
        with torch.cuda.stream(self._side_stream) if self._side_stream is not None else nullcontext():
            self.state[2:].copy_(self._one, non_blocking=True)


def make_peer_buffers(rank: int, addresses: Sequence[int], device: torch.device, owner: object = None) -> PeerBuffers:
    """addresses: of every rank's buffer, as this rank sees it."""
    pointers = torch.tensor(addresses, dtype=torch.int64, device=device)
    return PeerBuffers(rank, len(addresses), pointers, torch.zeros(3, dtype=torch.int64, device=device), owner)


def reduce_add_rms_norm(
    shares: Sequence[Tensor], residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition, with the shares of all ranks at hand: (rms_norm(s) * weight, s)."""
    total = torch.stack([share.float() for share in shares]).sum(0).to(residual.dtype)
    return add_rms_norm(total, residual, weight, eps)


def best_method(x: Tensor, peers: PeerBuffers) -> str | None:
    """ "one_shot", "two_shot" or None: a library's all-reduce. Depends on the shape alone, so the ranks agree."""
    num_bytes = x.numel() * x.element_size()
    if num_bytes == 0 or num_bytes > MAX_BYTES or x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return None
    methods = ("one_shot", "two_shot") if num_bytes <= ONE_SHOT_MAX_BYTES[peers.size] else ("two_shot",)
    num_rows, size = x.shape
    fitting = (method for method in methods if num_programs(method, num_rows, size, peers.size) <= MAX_PROGRAMS)
    return next(fitting, None)


def row_tile(size: int) -> tuple[int, int, int]:
    """(rows a tile, padded row, num_warps): few rows, so that a small message has many programs."""
    block = next_power_of_2(size)
    rows = max(1024 // block, 1)
    return rows, block, min(max(rows * block // 512, 1), 16)


def num_programs(method: str, num_rows: int, size: int, num_ranks: int) -> int:
    num_tiles = cdiv(num_rows, row_tile(size)[0])
    return num_tiles if method == "one_shot" else cdiv(num_tiles, num_ranks)


@jit
def _flag(pointers_ptr, owner, phase, program, peer, MAX_PROGRAMS: tl.constexpr, MAX_SIZE: tl.constexpr):
    """Pointer to the flag in owner's buffer that `peer` sets."""
    flags = tl.load(pointers_ptr + owner).to(tl.pointer_type(tl.int64))
    return flags + (phase * MAX_PROGRAMS + program) * MAX_SIZE + peer


@jit
def _exchange(
    pointers_ptr, state_ptr, epoch, phase, max_polls, RANK: tl.constexpr, SIZE: tl.constexpr,
    MAX_PROGRAMS: tl.constexpr, MAX_SIZE: tl.constexpr, POLLS_PER_LOOK: tl.constexpr,
):  # fmt: skip
    """Tell every peer that this program has written its part, wait until theirs have. Returns 0.0, or NaN if late."""
    program = tl.program_id(0)
    tl.debug_barrier()  # what all threads of the program wrote comes before the flags
    for step in tl.static_range(1, SIZE):
        peer = (RANK + step) % SIZE
        flag = _flag(pointers_ptr, peer, phase, program, RANK, MAX_PROGRAMS, MAX_SIZE)
        tl.atomic_xchg(flag, epoch, sem="release", scope="sys")
    late = 0
    for step in tl.static_range(1, SIZE):
        flag = _flag(pointers_ptr, RANK, phase, program, (RANK + step) % SIZE, MAX_PROGRAMS, MAX_SIZE)
        seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
        polls = 0
        while (seen < epoch) & (polls < max_polls):
            seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
            polls += 1
            is_look = polls % POLLS_PER_LOOK == 0
            is_over = tl.load(state_ptr + 2, mask=is_look, other=0, volatile=True)
            polls = tl.where(is_over > 0, max_polls, polls)
        late += (seen < epoch).to(tl.int32)
    tl.debug_barrier()  # nothing of the peers is read before
    return tl.where(late > 0, float("nan"), 0.0)


@jit
def _end_of_epoch(state_ptr, epoch):
    """The last program of the launch counts it."""
    num_ended = tl.atomic_add(state_ptr + 1, 1, sem="acq_rel", scope="gpu")
    if num_ended == tl.num_programs(0) - 1:
        tl.store(state_ptr + 1, num_ended * 0)
        tl.store(state_ptr, epoch)


@jit
def _data(pointers_ptr, owner, epoch, area, FLAG_BYTES: tl.constexpr, MAX_BYTES: tl.constexpr, dtype: tl.constexpr):
    """Pointer to owner's messages (area 0) or sums (area 1) of this epoch."""
    half = epoch % 2
    start = tl.load(pointers_ptr + owner) + FLAG_BYTES + (area * 2 + half) * MAX_BYTES
    return tl.multiple_of(start.to(tl.pointer_type(dtype)), 16)  # so that loads and stores are of 16 bytes


@jit
def _sum_of_peers(pointers_ptr, epoch, offsets, mask, late, SIZE: tl.constexpr, FLAG_BYTES: tl.constexpr,
                  MAX_BYTES: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Of every rank's message at `offsets`, in float32 and in the order of the ranks; rounded to dtype."""
    total = tl.load(_data(pointers_ptr, 0, epoch, 0, FLAG_BYTES, MAX_BYTES, dtype) + offsets, mask=mask, other=0.0)
    total = total.to(tl.float32)
    for peer in tl.static_range(1, SIZE):
        data = _data(pointers_ptr, peer, epoch, 0, FLAG_BYTES, MAX_BYTES, dtype)
        total += tl.load(data + offsets, mask=mask, other=0.0).to(tl.float32)
    return (total + late).to(dtype)


@jit
def _add_and_norm(total, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, cols, mask, residual_stride, D, eps):
    """The row-wise end: adds the residual, norms, writes both. As kernels/rms_norm.py does it."""
    residual = tl.load(residual_ptr + (rows * residual_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0)
    total = total + residual
    x32 = total.to(tl.float32)
    mean = tl.sum(x32 * x32, axis=1) / D
    normed = (x32 * tl.rsqrt(mean + eps)[:, None]).to(total.dtype) * weight[None, :]
    outs = (rows * D)[:, None] + cols[None, :]
    tl.store(sum_ptr + outs, total, mask=mask)
    tl.store(out_ptr + outs, normed, mask=mask)


@jit(do_not_specialize=("num_rows",))
def _one_shot_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, pointers_ptr, state_ptr,
    num_rows, x_stride, residual_stride, D, eps, max_polls,
    RANK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    FLAG_BYTES: tl.constexpr, MAX_BYTES: tl.constexpr, MAX_PROGRAMS: tl.constexpr, MAX_SIZE: tl.constexpr,
    POLLS_PER_LOOK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    epoch = tl.load(state_ptr) + 1
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    offsets = (rows * D)[:, None] + cols[None, :]
    x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
    tl.store(_data(pointers_ptr, RANK, epoch, 0, FLAG_BYTES, MAX_BYTES, dtype) + offsets, x, mask=mask)
    late = _exchange(pointers_ptr, state_ptr, epoch, 0, max_polls, RANK, SIZE, MAX_PROGRAMS, MAX_SIZE, POLLS_PER_LOOK)
    total = _sum_of_peers(pointers_ptr, epoch, offsets, mask, late, SIZE, FLAG_BYTES, MAX_BYTES, dtype)
    _add_and_norm(total, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, cols, mask, residual_stride, D, eps)
    _end_of_epoch(state_ptr, epoch)


@jit(do_not_specialize=("num_rows",))
def _two_shot_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, sum_ptr, pointers_ptr, state_ptr,
    num_rows, x_stride, residual_stride, D, eps, max_polls,
    RANK: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
    FLAG_BYTES: tl.constexpr, MAX_BYTES: tl.constexpr, MAX_PROGRAMS: tl.constexpr, MAX_SIZE: tl.constexpr,
    POLLS_PER_LOOK: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    epoch = tl.load(state_ptr) + 1
    first = tl.program_id(0).to(tl.int64) * SIZE * ROWS  # of SIZE tiles, the RANK-th of which is ours to sum
    cols = tl.arange(0, BLOCK_D)
    ours = _data(pointers_ptr, RANK, epoch, 0, FLAG_BYTES, MAX_BYTES, dtype)
    for tile in tl.static_range(0, SIZE):
        rows = first + tile * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
        x = tl.load(x_ptr + (rows * x_stride)[:, None] + cols[None, :], mask=mask, other=0.0)
        tl.store(ours + (rows * D)[:, None] + cols[None, :], x, mask=mask)
    late = _exchange(pointers_ptr, state_ptr, epoch, 0, max_polls, RANK, SIZE, MAX_PROGRAMS, MAX_SIZE, POLLS_PER_LOOK)
    rows = first + RANK * ROWS + tl.arange(0, ROWS)
    mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
    offsets = (rows * D)[:, None] + cols[None, :]
    total = _sum_of_peers(pointers_ptr, epoch, offsets, mask, late, SIZE, FLAG_BYTES, MAX_BYTES, dtype)
    tl.store(_data(pointers_ptr, RANK, epoch, 1, FLAG_BYTES, MAX_BYTES, dtype) + offsets, total, mask=mask)
    late += _exchange(pointers_ptr, state_ptr, epoch, 1, max_polls, RANK, SIZE, MAX_PROGRAMS, MAX_SIZE, POLLS_PER_LOOK)
    for step in tl.static_range(0, SIZE):
        owner = (RANK + step) % SIZE
        rows = first + owner * ROWS + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & (cols < D)[None, :]
        sums = _data(pointers_ptr, owner, epoch, 1, FLAG_BYTES, MAX_BYTES, dtype)
        total = tl.load(sums + (rows * D)[:, None] + cols[None, :], mask=mask, other=0.0)
        total = (total.to(tl.float32) + late).to(dtype)
        _add_and_norm(total, residual_ptr, weight_ptr, out_ptr, sum_ptr, rows, cols, mask, residual_stride, D, eps)
    _end_of_epoch(state_ptr, epoch)


def launch_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, peers: PeerBuffers, method: str = "one_shot"
) -> tuple[Tensor, Tensor]:
    """(rms_norm(s) * weight, s). x: our share, residual: [N, D], rows may be strided. All ranks launch alike.

    method: "one_shot" or "two_shot". x.numel() * element_size is at most MAX_BYTES, num_programs at most MAX_PROGRAMS.
    """
    N, D = x.shape
    assert x.stride(1) == residual.stride(1) == 1
    assert residual.shape == x.shape
    assert weight.is_contiguous()
    assert x.dtype == residual.dtype == weight.dtype
    assert N * D * x.element_size() <= MAX_BYTES
    grid = num_programs(method, N, D, peers.size)
    assert grid <= MAX_PROGRAMS
    out, total = torch.empty(2, N, D, dtype=x.dtype, device=x.device)
    rows, block, num_warps = row_tile(D)
    kernel = _one_shot_kernel if method == "one_shot" else _two_shot_kernel
    kernel[(grid,)](
        x, residual, weight, out, total, peers.pointers, peers.state,
        N, x.stride(0), residual.stride(0), D, eps, peers.max_polls,
        RANK=peers.rank, SIZE=peers.size, ROWS=rows, BLOCK_D=block,
        FLAG_BYTES=FLAG_BYTES, MAX_BYTES=MAX_BYTES, MAX_PROGRAMS=MAX_PROGRAMS, MAX_SIZE=max(SIZES),
        POLLS_PER_LOOK=POLLS_PER_LOOK, num_warps=num_warps,
    )  # fmt: skip
    return out, total
