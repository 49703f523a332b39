"""What is added up of a layer's inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer

# Columns of a symmetric product that are computed at a time.
_COLUMNS = 384


class Statistic(Protocol):
    """Anything that learns from a layer's inputs, batch after batch, and keeps less than them.

    Attributes:
        count: tokens seen so far.
    """

    count: int

    def update(self, inputs: torch.Tensor) -> None:
        """Take in `inputs` of shape (tokens, features), in the layer's dtype and on its device; no token is padding."""


class SummedInputs(ABC):
    """A statistic that is a sum over batches: of layers that get the same inputs only the first needs computing it.

    Attributes:
        count: tokens seen so far.
    """

    def __init__(self) -> None:
        self.count = 0

    @classmethod
    @abstractmethod
    def sums(cls, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return what a batch (tokens, features) adds; nobody changes it."""

    @abstractmethod
    def add(self, tokens: int, sums: tuple[torch.Tensor, ...]) -> None:
        """Add what `sums` returned for a batch of so many tokens."""

    @torch.no_grad()
    def update(self, inputs: torch.Tensor) -> None:
        """Add a batch (tokens, features)."""
        self.add(len(inputs), self.sums(inputs))


class Ignored:
    """Learns nothing: stands where inputs must come by and nobody asks for them.

    Args:
        layer: not looked at.
    """

    def __init__(self, layer: WeightLayer) -> None:
        self.count = 0

    def update(self, inputs: torch.Tensor) -> None:
        """Leave `inputs` alone."""


class InputNorms:
    """The squared length of each input feature over all tokens: what Wanda (arXiv 2306.11695) weighs weights by.

    Args:
        features: how many inputs the layer has.
        device: where the sums are kept.

    Attributes:
        count: tokens seen so far.
        squares: sums of x^2, shape (features,), float32.

    Example:
        >>> seen = InputNorms(2)
        >>> seen.update(torch.tensor([[3.0, 1.0], [4.0, 0.0]]))
        >>> seen.count, seen.norms().tolist()
        (2, [5.0, 1.0])
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.squares = torch.zeros(features, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, layer: WeightLayer) -> InputNorms:
        """Return an empty one for `layer`, on its device."""
        return cls(layer.weight.shape[layer.input_axis], layer.weight.device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor) -> None:
        """Add the squares of `inputs` (tokens, features)."""
        self.count += len(inputs)
        self.squares += inputs.float().square().sum(0)

    def norms(self) -> torch.Tensor:
        """Return the L2 norm of each feature over all tokens, shape (features,)."""
        return self.squares.sqrt()


class InputProducts(SummedInputs):
    """The sum over all tokens of x x^T, half the Hessian of a layer's squared error (OBC, arXiv 2208.11580).

    Args:
        features: how many inputs the layer has; the sums take 4 x features^2 bytes.
        device: where the sums are kept.

    Attributes:
        count: tokens seen so far.
        products: the sums, shape (features, features), float32, symmetric.

    Example:
        >>> seen = InputProducts(2)
        >>> seen.update(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        >>> seen.products.tolist()
        [[1.0, 2.0], [2.0, 5.0]]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.products = torch.zeros(features, features, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, layer: WeightLayer) -> InputProducts:
        """Return an empty one for `layer`, on its device."""
        return cls(layer.weight.shape[layer.input_axis], layer.weight.device)

    @classmethod
    def sums(cls, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return x x^T, summed over `inputs` (tokens, features)."""
        return (_products(inputs.float()),)

    def add(self, tokens: int, sums: tuple[torch.Tensor, ...]) -> None:
        """Add the products of a batch."""
        self.count += tokens
        self.products += sums[0]


def _products(tokens: torch.Tensor) -> torch.Tensor:
    """Return `tokens.T @ tokens`, of which half is enough to know the other one."""
    features = tokens.shape[1]
    found = tokens.new_empty(features, features)
    for start in range(0, features, _COLUMNS):
        own, behind = slice(start, start + _COLUMNS), slice(start + _COLUMNS, features)
        torch.mm(tokens[:, own].t(), tokens[:, start:], out=found[own, start:])
        found[behind, own] = found[own, behind].t()
    return found


def parts_of(layer: WeightLayer) -> int:
    """Return how many statistics a layer has: one, or for 3-D experts one for each."""
    return layer.weight.shape[0] if layer.kind == "experts" else 1
