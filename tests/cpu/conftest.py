import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reaches for the network fails at once

import pytest
import torch
from checkpoints import Checkpoint, make_checkpoint

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A tiny random LLaMA."""
    return make_checkpoint(tmp_path_factory.mktemp("llama"))
