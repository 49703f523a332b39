"""Hard losses: how far the student is from the labels."""

from __future__ import annotations

import torch
from torch.nn import functional

from .positions import Count, counted


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the negative log-likelihood of the labels, in nats.

    Args:
        logits: (..., classes).
        labels: class indices (...); those outside the mask are not looked at.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> round(float(cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2]))), 4)
        1.3863
    """
    logits, labels, count = counted(logits, labels, mask, count)
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / count


def squared_error(
    student: torch.Tensor, target: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the mean squared error of real-valued outputs (...): the loss of a regression head, soft or hard.

    Example:
        >>> float(squared_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])))
        2.0
    """
    student, target, count = counted(student, target.detach(), mask, count)
    return (student.float() - target.float()).square().sum() / count
