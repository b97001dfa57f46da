"""Tests of several real GPUs: `python -m pytest tests/multi -v -s`. Skipped where PyTorch sees fewer than two.

Everything runs in children with a deadline, so that a GPU that hangs costs one test.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "cpu"))


@pytest.fixture(scope="session", autouse=True)
def two_gpus():
    import torch

    if torch.cuda.device_count() < 2:
        pytest.skip(f"these tests need two GPUs, and PyTorch sees {torch.cuda.device_count()}")
