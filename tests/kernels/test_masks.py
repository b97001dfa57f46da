import pytest
import torch
from sampling_cases import DTYPES, make_logits

from evenflow.kernels.masks import BLOCK, apply_masks_, launch_apply_masks_


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab_size", [1, 32, 100, BLOCK + 33])
@pytest.mark.parametrize("launch", [launch_apply_masks_, apply_masks_])
def test_bits_that_are_not_set_are_banned(launch, vocab_size, dtype):
    logits = make_logits(4, vocab_size, dtype)
    allowed = torch.rand(3, vocab_size, generator=torch.Generator().manual_seed(0)) < 0.5
    padded = torch.zeros(3, -(-vocab_size // 32) * 32, dtype=torch.int64)
    padded[:, :vocab_size] = allowed
    words = (padded.unflatten(-1, (-1, 32)) << torch.arange(32)).sum(-1)
    bits = ((words + 2**31) % 2**32 - 2**31).to(torch.int32)
    expected = logits.clone()
    for mask, row in ((0, 2), (2, 0)):
        expected[row, ~allowed[mask]] = -torch.inf
    logits[0, ~allowed[2]] = torch.nan  # no longer seen
    launch(logits, torch.tensor([2, -1, 0]), bits)
    assert torch.equal(logits, expected)


def test_no_masks():
    logits = make_logits(2, 40)
    before = logits.clone()
    launch_apply_masks_(logits, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int32))
    assert torch.equal(logits, before)
