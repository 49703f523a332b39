"""What is given back to the caller when a model was only looked at, or run on the way: its modes, and chance."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Give the caller's random state of Python, numpy and torch back afterwards.

    Example:
        >>> with random_state_kept():
        ...     inside = torch.rand(3)
        >>> torch.equal(torch.rand(3), inside)
        True
    """
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give each module its own train or eval mode back afterwards, which `train()` of the whole would not.

    Example:
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with modes_kept(model):
        ...     mode = model.eval().training
        >>> mode, [module.training for module in model.modules()]
        (False, [True, True, False])
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
