"""What grammars allow: -inf for every token whose bit is not set. Shapes: R rows, V vocabulary, K masks."""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
from torch import Tensor

from evenflow.kernels.language import cdiv, jit, tl
from evenflow.kernels.sampling import apply_masks_ as apply_gathered_masks_

BLOCK = 4096
NUM_WARPS = 4


def apply_masks_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """-inf for what a row's mask does not allow, in place. logits: [R, V], rows may be strided.

    rows: [K] int32 or int64, -1 is padding, no row twice. bits: [K, ceil(V / 32)] int32; bit i of word w stands for
    token 32 * w + i.
    """
    if logits.is_cuda:
        launch_apply_masks_(logits, rows, bits)
        return
    masks = torch.nonzero(rows >= 0)[:, 0]
    apply_gathered_masks_(logits, rows[masks].long(), bits[masks])


@jit
def _apply_masks_kernel(logits_ptr, rows_ptr, bits_ptr, row_stride, bits_stride, V, BLOCK: tl.constexpr):
    mask_index = tl.program_id(1)
    row = tl.load(rows_ptr + mask_index).to(tl.int64)
    if row < 0:
        return
    tokens = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(bits_ptr + mask_index * bits_stride + tokens // 32, mask=tokens < V, other=-1)
    is_banned = ((words >> (tokens % 32)) & 1) == 0
    values = tl.full([BLOCK], -float("inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * row_stride + tokens, values, mask=is_banned & (tokens < V))


def launch_apply_masks_(logits: Tensor, rows: Tensor, bits: Tensor) -> None:
    """The kernel of apply_masks_."""
    vocab_size = logits.shape[1]
    assert logits.stride(1) == bits.stride(1) == 1
    assert bits.dtype == torch.int32
    assert bits.shape == (len(rows), cdiv(vocab_size, 32))
    if len(rows):
        _apply_masks_kernel[(cdiv(vocab_size, BLOCK), len(rows))](
            logits, rows, bits, logits.stride(0), bits.stride(0), vocab_size, BLOCK=BLOCK, num_warps=NUM_WARPS
        )
