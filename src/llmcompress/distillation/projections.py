"""Learned projections: a linear layer from the student's hidden states to a teacher's of another width.

They are trained beside the student and thrown away (FitNets, arXiv 1412.6550; TinyBERT, arXiv 1909.10351). Each starts
at the least-squares fit of the states of some rows, so that the student learns from the first step, and not from the
noise of a random start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "distillation_projections"
# Added to the diagonal, relative to its mean: hidden features may depend on each other.
_RIDGE = 1e-3

Place = tuple[int, int]
"""Stack, and number of the hidden state: 0 enters the first block, i + 1 leaves block i."""


class LeastSquares:
    """Finds the linear layer that takes the student's states nearest to the teacher's, from any number of batches.

    Example:
        >>> states, seen = torch.randn(100, 4), LeastSquares()
        >>> for half in states.split(50):
        ...     seen.add(half, half @ torch.ones(4, 6) + 1)
        >>> torch.allclose(seen.layer()(states), states @ torch.ones(4, 6) + 1, atol=0.1)
        True
    """

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []
        self._count = 0
        self._device = torch.device("cpu")

    def add(self, student: torch.Tensor, teacher: torch.Tensor) -> None:
        """Take in the states (tokens, width) of some tokens."""
        ours, theirs = student.detach().double(), teacher.detach().to(student.device).double()
        sums = [ours.T @ ours, ours.T @ theirs, ours.sum(0), theirs.sum(0)]
        self._sums = [old + new for old, new in zip(self._sums, sums, strict=True)] if self._sums else sums
        self._count += len(ours)
        self._device = student.device

    def layer(self) -> nn.Linear:
        """Return the layer."""
        gram, cross, ours, theirs = (one / max(self._count, 1) for one in self._sums)
        gram, cross = gram - torch.outer(ours, ours), cross - torch.outer(ours, theirs)
        gram.diagonal().add_(gram.diagonal().mean() * _RIDGE + torch.finfo(gram.dtype).tiny)
        weight = torch.linalg.solve(gram, cross)
        layer = nn.Linear(*weight.shape, device=self._device)
        with torch.no_grad():
            layer.weight.copy_(weight.T)
            layer.bias.copy_(theirs - ours @ weight)
        return layer


@contextmanager
def projected(
    model: PreTrainedModel, layers: dict[Place, nn.Linear], names: Sequence[str] = ("hidden_states",)
) -> Iterator[None]:
    """Have `model` put out the hidden states of `layers`' places as projected; inside it holds the layers itself.

    So they are parameters of the model like others to the optimizer, and to what shares gradients between processes;
    and they run in its forward pass, where such a wrapper looks for them.

    Args:
        model: the student.
        layers: by place.
        names: where each stack's states stand in the outputs.
    """
    if not layers:
        yield
        return
    model.add_module(_NAME, nn.ModuleDict({f"{stack}_{state}": layer for (stack, state), layer in layers.items()}))

    def project(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        own = module.get_submodule(_NAME)
        for stack, name in enumerate(names):
            states = getattr(outputs, name, None)
            if states is not None:
                outputs[name] = tuple(
                    own[f"{stack}_{i}"](state) if (stack, i) in layers else state for i, state in enumerate(states)
                )
        return outputs

    hook = model.register_forward_hook(project)
    try:
        yield
    finally:
        hook.remove()
        del model._modules[_NAME]
