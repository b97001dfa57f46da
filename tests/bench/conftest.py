import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from servers import OpenAIServer

torch.set_num_threads(1)


@pytest.fixture
def server():
    """A server on a real socket that speaks as OpenAI's; its `answer` is what a test makes of it."""
    with OpenAIServer() as running:
        yield running
