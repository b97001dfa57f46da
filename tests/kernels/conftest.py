"""Every test here interprets the kernels that it launches: CPU tensors, no compiler, no GPU."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    pytest.importorskip("triton", reason="the kernels need Triton, interpreted or not")
    from interpreter import interpreted

    with interpreted():
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
