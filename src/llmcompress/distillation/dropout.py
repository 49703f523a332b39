"""Where models keep their dropout, and another share of it for a while."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def dropout_of(modules: Iterable[nn.Module], share: float) -> Iterator[None]:
    """Have modules drop another share of their activations inside, and their own again afterwards.

    Modules keep it as `nn.Dropout` or as a number of their own, which is passed to a function.

    Example:
        >>> module = nn.Sequential(nn.Dropout(0.3))
        >>> with dropout_of(module.modules(), 0.0):
        ...     module[0].p
        0.0
        >>> module[0].p
        0.3
    """
    kept = [place for module in modules for place in _places(module)]
    try:
        for module, name, _ in kept:
            setattr(module, name, share)
        yield
    finally:
        for module, name, own in kept:
            setattr(module, name, own)


def _places(module: nn.Module) -> Iterator[tuple[nn.Module, str, float]]:
    if isinstance(module, nn.Dropout):
        yield module, "p", module.p
    for name, value in vars(module).items():
        if "dropout" in name and isinstance(value, float):
            yield module, name, value
