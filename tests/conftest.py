"""What every test needs: one thread, since the models are tiny, and the tokenizer that fits them."""

import sys

import pytest
import torch

import llmcompress as lc
from llmcompress.testing import tiny_tokenizer


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def built_in_strategies():
    """The library's own strategies by name; a doctest that ran in this process may have registered one more."""
    classes = {name: lc.compressors.get(name) for name in lc.compressors}
    return {
        name: cls
        for name, cls in classes.items()
        if cls.__module__.startswith("llmcompress.") and hasattr(sys.modules[cls.__module__], cls.__name__)
    }


@pytest.fixture
def tokenizer():
    return tiny_tokenizer()
