"""What tests share: the tokenizer of the tiny models, and one fresh process that reloads what they saved."""

import gc
import sys

import pytest

import llmcompress as lc


@pytest.fixture(scope="module", autouse=True)
def _nothing_imported_is_looked_through_again():
    # Trainer and accelerate collect garbage several times a training: half a second each, over all that was imported.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def _saved():
    """Collects folders for `check_reloads`: all that a worker's tests saved are read at its end, in one process."""
    from llmcompress.testing import check_reloads

    with_llmcompress, plain = [], []
    yield with_llmcompress, plain
    check_reloads(with_llmcompress, plain=plain)


@pytest.fixture(scope="session")
def reloads(_saved):
    """Folders that a fresh process will read at the end: append to it."""
    return _saved[0]


@pytest.fixture(scope="session")
def plain_reloads(_saved):
    """The same for folders that load without llmcompress."""
    return _saved[1]


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
    from llmcompress.testing import tiny_tokenizer

    return tiny_tokenizer()
