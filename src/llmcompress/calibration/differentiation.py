"""A model made ready for gradients of a few of its parameters, and left as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..anatomy.kept import modes_kept


@contextmanager
def differentiable(model: nn.Module, parameters: Sequence[torch.Tensor]) -> Iterator[None]:
    """Have `model` in eval mode with gradients of `parameters` alone, for as long as this is open.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with differentiable(layer, [layer.weight]):
        ...     print([parameter.requires_grad for parameter in layer.parameters()])
        [True, False]
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with modes_kept(model):
        try:
            model.eval()
            for parameter, _ in wanted:
                parameter.requires_grad_(False)
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter, requires in wanted:
                parameter.requires_grad_(requires)
