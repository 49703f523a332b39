"""What is added up of a layer's inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer


class Statistic(Protocol):
    """Anything that learns from a layer's inputs, batch after batch, and keeps less than them.

    Attributes:
        count: tokens seen so far.
    """

    count: int

    def update(self, inputs: torch.Tensor) -> None:
        """Take in `inputs` of shape (tokens, features), in the layer's dtype and on its device; no token is padding."""


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
        self.squares = torch.zeros(features, device=device)

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


class InputProducts:
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
        self.count = 0
        self.products = torch.zeros(features, features, device=device)

    @classmethod
    def of(cls, layer: WeightLayer) -> InputProducts:
        """Return an empty one for `layer`, on its device."""
        return cls(layer.weight.shape[layer.input_axis], layer.weight.device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor) -> None:
        """Add the products of `inputs` (tokens, features)."""
        self.count += len(inputs)
        tokens = inputs.float()
        self.products.addmm_(tokens.t(), tokens)


def parts_of(layer: WeightLayer) -> int:
    """Return how many statistics a layer has: one, or for 3-D experts one for each."""
    return layer.weight.shape[0] if layer.kind == "experts" else 1
