"""What every test and doctest runs under: one thread and hardly any timing, since the models are tiny.

Heavy imports are inside, here and in tests/conftest.py: the process that only hands tests to its workers needs none.
"""

from functools import partial

import pytest


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _few_timed_passes():
    """Time by one short pass a turn, in the fewest rounds: what a tiny model takes means nothing."""
    from llmcompress import measured
    from llmcompress.evaluation import cost, generation_latency, latency

    with pytest.MonkeyPatch.context() as patch:
        for module in (latency, generation_latency):
            patch.setattr(module, "QUICK_MS", 0.0)
        patch.setattr(measured, "SPEED_TOKENS", 8)
        for name in ("measure_latencies", "measure_generation"):
            patch.setattr(cost, name, partial(getattr(cost, name), seconds=0.01))
        yield


@pytest.fixture(autouse=True)
def _speed_only_where_it_is_looked_at(request, monkeypatch):
    """Spare `compress` its timing, which takes longer than most steps, but in tests marked `timed`."""
    if request.node.get_closest_marker("timed") is None:
        monkeypatch.setattr("llmcompress.run.speed_against", lambda base, candidate: None)
