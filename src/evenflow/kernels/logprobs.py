"""Log-probabilities of chosen tokens, their ranks, and the best alternatives. Shapes: R rows, V vocabulary, k best.

On a GPU two kernels read each row once: parts of the vocabulary give their largest logit, their sum of exponentials and
how many logits are larger than the chosen one, then a program a row adds them up. The alternatives are torch.topk's.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels.language import cdiv, jit, next_power_of_2, tl

LOWEST_LOGPROB = -9999.0  # stands for -inf, which JSON lacks; NaN stays, for the caller to refuse
_NUM_SPARE = 16  # candidates beyond k, so that a tie at the k-th place is rarely cut
_INF = tl.constexpr(float("inf"))

BLOCK = 2048  # of the vocabulary at a time
NUM_WARPS = 4
NUM_PROGRAMS = 512  # wanted for a launch: several on every unit of a large GPU


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """logits: [R, V]; token_ids: [R]. Returns (ids [R, 1 + k] int64, logprobs [R, 1 + k] float32, ranks [R] int64).

    Column 0 is the given token, then the k best in falling order, equals by id. rank: 1 + the number of larger logits.
    On a GPU a token of -1 has log-probability NaN.
    """
    if logits.is_cuda:
        return launch_token_logprobs(logits, token_ids, k)
    own = logits.gather(1, token_ids[:, None])
    ranks = 1 + (logits > own).sum(-1)
    largest = logits.amax(-1, keepdim=True)
    log_total = (logits - largest).exp_().sum(-1, keepdim=True).log_()
    values, ids = own, token_ids[:, None]
    if k > 0:
        best_values, best_ids = _top(logits, min(k, logits.shape[1]))
        values, ids = torch.cat([own, best_values], 1), torch.cat([ids, best_ids], 1)
    logprobs = (values - largest) - log_total
    return ids, logprobs.clamp(min=LOWEST_LOGPROB), ranks


def _top(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """topk in falling order, equals in the order of their ids whatever k is asked for."""
    values, ids = logits.topk(min(k + _NUM_SPARE, logits.shape[1]))
    ids, order = ids.sort(-1)
    values, order = values.gather(1, order).sort(dim=-1, descending=True, stable=True)
    ids = ids.gather(1, order)
    if values.shape[1] < logits.shape[1]:
        cut = torch.nonzero(values[:, k - 1] == values[:, -1])[:, 0]
        if len(cut):
            whole = logits[cut].sort(dim=-1, descending=True, stable=True)
            values[cut], ids[cut] = whole.values[:, : values.shape[1]], whole.indices[:, : values.shape[1]]
    return values[:, :k], ids[:, :k]


def _top_of_keys(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The same without an answer on the host: topk of integers that hold the value's order, then the id's."""
    bits = (logits.float() + 0.0).view(torch.int32).long()  # + 0.0: -0 and 0 are equal
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)) << 32
    keys |= torch.arange(logits.shape[1] - 1, -1, -1, device=logits.device)
    ids = logits.shape[1] - 1 - (keys.topk(k).values & 0xFFFFFFFF)
    return logits.gather(1, ids).float(), ids


@jit
def _partial_logprobs_kernel(
    logits_ptr, token_ids_ptr, partial_ptr, larger_ptr, row_stride, V, part_size, BLOCK: tl.constexpr
):  # fmt: skip
    part, row = tl.program_id(0), tl.program_id(1)
    logits_ptr += row.to(tl.int64) * row_stride
    token = tl.load(token_ids_ptr + row)
    own = tl.load(logits_ptr + token, mask=token >= 0, other=0.0).to(tl.float32)
    cols = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], -_INF, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    num_larger = tl.zeros([BLOCK], tl.int32)
    end = tl.minimum((part + 1) * part_size, V)
    for start in range(part * part_size, end, BLOCK):
        x = tl.load(logits_ptr + start + cols, mask=start + cols < end, other=-_INF).to(tl.float32)
        most = tl.maximum(largest, x)
        shift = tl.where(most == -_INF, 0.0, most)
        total = total * tl.exp(largest - shift) + tl.exp(x - shift)
        largest = most
        num_larger += (x > own).to(tl.int32)
    most = tl.max(largest, axis=0)
    shift = tl.where(most == -_INF, 0.0, most)
    total = tl.sum(total * tl.exp(largest - shift), axis=0)
    out = row * tl.num_programs(0) + part
    tl.store(partial_ptr + 2 * out, most)
    tl.store(partial_ptr + 2 * out + 1, total)
    tl.store(larger_ptr + out, tl.sum(num_larger, axis=0))


@jit
def _logprobs_kernel(
    logits_ptr, token_ids_ptr, partial_ptr, larger_ptr, values_ptr, ids_ptr, out_ids_ptr, out_ptr, ranks_ptr,
    row_stride, num_parts, K, BLOCK_PARTS: tl.constexpr, BLOCK_K: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    parts = tl.arange(0, BLOCK_PARTS)
    mask = parts < num_parts
    part_ptr = partial_ptr + 2 * (row * num_parts + parts)
    most = tl.load(part_ptr, mask=mask, other=-_INF)
    total = tl.load(part_ptr + 1, mask=mask, other=0.0)
    largest = tl.max(most, axis=0)
    shift = tl.where(largest == -_INF, 0.0, largest)
    log_total = tl.log(tl.sum(total * tl.exp(most - shift), axis=0))
    rank = 1 + tl.sum(tl.load(larger_ptr + row * num_parts + parts, mask=mask, other=0), axis=0)
    tl.store(ranks_ptr + row, rank.to(tl.int64))
    token = tl.load(token_ids_ptr + row).to(tl.int64)
    own = tl.load(logits_ptr + row.to(tl.int64) * row_stride + token, mask=token >= 0, other=float("nan"))
    cols = tl.arange(0, BLOCK_K)
    is_best = (cols > 0) & (cols <= K)
    best = row * K + cols - 1
    values = tl.where(cols == 0, own.to(tl.float32), tl.load(values_ptr + best, mask=is_best, other=0.0))
    ids = tl.where(cols == 0, token, tl.load(ids_ptr + best, mask=is_best, other=0))
    logprobs = (values - largest) - log_total
    logprobs = tl.where(logprobs < LOWEST, LOWEST, logprobs)
    tl.store(out_ids_ptr + row * (K + 1) + cols, ids, mask=cols <= K)
    tl.store(out_ptr + row * (K + 1) + cols, logprobs, mask=cols <= K)


def logprob_parts(num_rows: int, vocab_size: int) -> tuple[int, int]:
    """(parts of a row, their size): as many as fill a GPU, of whole blocks."""
    num_parts = min(cdiv(vocab_size, BLOCK), max(cdiv(NUM_PROGRAMS, num_rows), 1))
    part_size = cdiv(cdiv(vocab_size, num_parts), BLOCK) * BLOCK
    return cdiv(vocab_size, part_size), part_size


def launch_token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The kernels of token_logprobs."""
    num_rows, vocab_size = logits.shape
    k = min(k, vocab_size)
    assert logits.stride(1) == 1
    device = logits.device
    ids = torch.empty(num_rows, 1 + k, dtype=torch.int64, device=device)
    logprobs = torch.empty(num_rows, 1 + k, dtype=torch.float32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    if num_rows == 0:
        return ids, logprobs, ranks
    num_parts, part_size = logprob_parts(num_rows, vocab_size)
    partial = torch.empty(num_rows, num_parts, 2, dtype=torch.float32, device=device)
    larger = torch.empty(num_rows, num_parts, dtype=torch.int32, device=device)
    best_values, best_ids = _top_of_keys(logits, k) if k else (logprobs, ids)
    _partial_logprobs_kernel[(num_parts, num_rows)](
        logits, token_ids, partial, larger, logits.stride(0), vocab_size, part_size, BLOCK=BLOCK, num_warps=NUM_WARPS
    )
    _logprobs_kernel[(num_rows,)](
        logits, token_ids, partial, larger, best_values, best_ids, ids, logprobs, ranks, logits.stride(0), num_parts, k,
        BLOCK_PARTS=next_power_of_2(num_parts), BLOCK_K=next_power_of_2(1 + k), LOWEST=LOWEST_LOGPROB, num_warps=1,
    )  # fmt: skip
    return ids, logprobs, ranks
