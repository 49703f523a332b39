"""The factor of the inverse Hessian by which SparseGPT and GPTQ let later columns make up for earlier ones."""

from __future__ import annotations

import torch

from ..errors import CompressionError

# With this much of its mean diagonal added to it, any sum of squares has a Cholesky factor.
_MOST_DAMPENING = 10.0


@torch.no_grad()
def inverse_root(products: torch.Tensor, dampening: float, *, who: str) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor of the inverse of `products`, dampened as much as it takes.

    Row j of the factor tells how all columns behind j are updated when j changes, with the columns before j fixed.

    Args:
        products: sums of x x^T, shape (inputs, inputs); an input that was always zero is one with a diagonal of zero.
        dampening: share of the mean diagonal to begin with.
        who: the strategy's name, for messages.

    Returns:
        The factor, float32, and the dampening that it took.

    Raises:
        CompressionError: no dampening helps.

    Example:
        >>> root, dampening = inverse_root(torch.tensor([[2.0, 0.0], [0.0, 0.0]]), 0.25, who="example")
        >>> [round(1 / float(entry) ** 2, 4) for entry in root.diagonal()], dampening
        ([2.25, 0.25], 0.25)
    """
    # Apple's GPUs know no float64.
    exact = products.to(torch.float32 if products.device.type == "mps" else torch.float64)
    mean = exact.diagonal().mean()
    share = dampening
    while share <= _MOST_DAMPENING:
        damped = exact.clone()
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            root, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and bool(torch.isfinite(root).all()):
                return root.float(), share
        share *= 10
    raise CompressionError(
        f"{who}: the inputs of a layer have no Hessian that can be inverted, not even with "
        f"{_MOST_DAMPENING:g} of its mean diagonal ({float(mean):g}) added; check the activations before it."
    )
