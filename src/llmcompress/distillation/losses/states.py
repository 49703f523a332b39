"""How far hidden states of the student are from the teacher's, token by token."""

from __future__ import annotations

import torch
from torch.nn import functional

from .positions import Count, counted


def relative_error(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the squared error of hidden states over the teacher's squared norm, token by token.

    The mean squared error of TinyBERT (arXiv 1909.10351) and patient distillation (arXiv 1908.09355), relative to each
    token's own size: 0 is equal, 1 is what an all-zero student has, whatever the layer's scale. So layers of different
    scale weigh the same, and no token with outlier activations outweighs the rest.

    Args:
        student: hidden states (..., width).
        teacher: hidden states of the same shape; they get no gradient.
        mask: which tokens (...) count; None counts all.
        count: what to divide by; None is the number of tokens that count here.

    Example:
        >>> float(relative_error(torch.zeros(2, 5, 8), torch.ones(2, 5, 8)))
        1.0
    """
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    student, teacher = student.float(), teacher.float()
    smallest = torch.finfo(teacher.dtype).tiny
    error = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=smallest)
    return error.sum() / count


def mean_squared_error(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the mean squared error of hidden states over their features (TinyBERT, arXiv 1909.10351), a token.

    Arguments as of `relative_error`.

    Example:
        >>> float(mean_squared_error(torch.zeros(2, 5, 8), 3 * torch.ones(2, 5, 8)))
        9.0
    """
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    return (student.float() - teacher.float()).square().mean(-1).sum() / count


def cosine_distance(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return 1 - the cosine of hidden states (DistilBERT, arXiv 1910.01108), a token: directions count, sizes do not.

    Arguments as of `relative_error`.

    Example:
        >>> states = torch.eye(4)
        >>> float(cosine_distance(2 * states, states)), float(cosine_distance(states, states.roll(1, 0)))
        (0.0, 1.0)
    """
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    return (1 - functional.cosine_similarity(student.float(), teacher.float(), dim=-1)).sum() / count
