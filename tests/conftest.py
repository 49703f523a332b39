"""What every test needs: one thread, since the models are tiny, and the tokenizer that fits them."""

import pytest
import torch

from llmcompress.testing import tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()
