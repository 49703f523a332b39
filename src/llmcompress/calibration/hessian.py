"""The factor of a layer's Hessian: what SparseGPT and GPTQ know of how its weights can make up for one another."""

from __future__ import annotations

import torch

from ..errors import CompressionError

# With this much of its mean diagonal added to it, any sum of squares has a Cholesky factor.
_MOST_DAMPENING = 10.0


@torch.no_grad()
def damped_root(products: torch.Tensor, dampening: float, *, who: str) -> tuple[torch.Tensor, float]:
    """Return the upper triangular R with R R^T = `products`, dampened as much as it takes.

    Column j of R / diag(R) tells how errors made in the columns before j are best made up for by column j, with the
    columns behind j still free.

    Args:
        products: sums of x x^T, shape (inputs, inputs); an input that was always zero is one with a diagonal of zero.
        dampening: share of the mean diagonal that is added to the diagonal, to begin with; grows tenfold as often as
            there is no factor.
        who: the strategy's name, for messages.

    Returns:
        The factor, float64 (float32 where the device has no other), and the dampening that it took.

    Raises:
        CompressionError: no dampening helps.

    Example:
        >>> root, dampening = damped_root(torch.tensor([[5.0, 2.0], [2.0, 4.0]]), 1e-9, who="example")
        >>> root.round(decimals=3).tolist(), dampening
        ([[2.0, 1.0], [0.0, 2.0]], 1e-09)
    """
    # Apple's GPUs know no float64.
    exact = torch.float32 if products.device.type == "mps" else torch.float64
    mean = products.diagonal().to(exact).mean()
    share = dampening
    while share <= _MOST_DAMPENING:
        damped = products.flip(0, 1).to(exact)  # the lower factor of it, flipped back, is the upper one
        damped.diagonal().add_(share * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped  # as large as all statistics of a block
        if not failed and bool(torch.isfinite(lower).all()):
            return lower.flip(0, 1), share
        share *= 10
    raise CompressionError(
        f"{who}: the inputs of a layer have no Hessian that can be inverted, not even with {_MOST_DAMPENING:g} of its "
        f"mean diagonal ({float(mean):g}) added; check the activations before it."
    )


@torch.no_grad()
def inverse_root(products: torch.Tensor, dampening: float, *, who: str) -> tuple[torch.Tensor, float]:
    """Return the upper Cholesky factor of the inverse of `products`, dampened as much as it takes.

    Row j of the factor tells how all columns behind j are updated when j changes, with the columns before j fixed.

    Args:
        products: as for `damped_root`.
        dampening: as for `damped_root`.
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
    root, share = damped_root(products, dampening, who=who)
    unit = torch.eye(len(root), dtype=root.dtype, device=root.device)
    return torch.linalg.solve_triangular(root, unit, upper=True).float(), share


def remark_on(dampening: float, grown: float) -> str | None:
    """Return what a report says of dampening that grew, or None.

    Example:
        >>> remark_on(0.01, 0.1)
        'dampening grew from 0.01 to 0.1: x x^T had no Cholesky factor with less'
    """
    if grown == dampening:
        return None
    return f"dampening grew from {dampening:g} to {grown:g}: x x^T had no Cholesky factor with less"
