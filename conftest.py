"""What every test and doctest runs under: one thread and few timed passes, since the models are tiny."""

from functools import partial

import pytest
import torch

from llmcompress import pipeline
from llmcompress.evaluation import cost, latency


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _few_timed_passes():
    """Time by one short pass a turn, in the fewest rounds: what a tiny model takes means nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "QUICK_MS", 0.0)
        patch.setattr(pipeline, "_SPEED_TOKENS", 8)
        for name in ("measure_latencies", "measure_generation"):
            patch.setattr(cost, name, partial(getattr(cost, name), seconds=0.01))
        yield
