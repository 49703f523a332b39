"""Distillation losses: pure functions of logits or hidden states, masked, and normalised by the positions that count.

Each returns a sum over counted positions divided by `count`. Under gradient accumulation, or over several processes,
pass the count of the whole global batch: then the sum of the parts is the loss of one big batch, which a mean of means
is not where batches differ in length.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch.nn import functional

Count: TypeAlias = "torch.Tensor | float | None"


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(teacher || student) at a temperature, times its square (Hinton et al., arXiv 1503.02531), in nats.

    The square keeps the gradient's size the same at any temperature, so that it can be weighed against a hard loss.

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape; they get no gradient.
        temperature: both logits are divided by it; above 0.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> logits = torch.tensor([[1.0, 2.0, 3.0]])
        >>> float(forward_kl(logits, logits, temperature=2.0))
        0.0
    """
    student, teacher, count = _counted(student, teacher.detach(), mask, count)
    log_student = functional.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=-1)
    total = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return total * temperature**2 / count


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the negative log-likelihood of the labels, in nats: the hard loss.

    Args:
        logits: (..., classes).
        labels: class indices (...); those outside the mask are not looked at.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> round(float(cross_entropy(torch.zeros(3, 4), torch.tensor([0, 1, 2]))), 4)
        1.3863
    """
    logits, labels, count = _counted(logits, labels, mask, count)
    return functional.cross_entropy(logits.float(), labels, reduction="sum") / count


def squared_error(
    student: torch.Tensor, target: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the mean squared error of real-valued outputs (...): the loss of a regression head, soft or hard.

    Example:
        >>> float(squared_error(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])))
        2.0
    """
    student, target, count = _counted(student, target.detach(), mask, count)
    return (student.float() - target.float()).square().sum() / count


def hidden_state_error(
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
        >>> float(hidden_state_error(torch.zeros(2, 5, 8), torch.ones(2, 5, 8)))
        1.0
    """
    student, teacher, count = _counted(student, teacher.detach(), mask, count)
    student, teacher = student.float(), teacher.float()
    smallest = torch.finfo(teacher.dtype).tiny
    error = (student - teacher).square().sum(-1) / teacher.square().sum(-1).clamp(min=smallest)
    return error.sum() / count


def _counted(
    first: torch.Tensor, second: torch.Tensor, mask: torch.Tensor | None, count: Count
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Keep the counted positions only: what does not count is not computed either."""
    second = second.to(first.device)
    if mask is not None:
        first, second = first[mask], second[mask]
        counted = int(mask.sum())
    else:
        positions = first.shape if second.dim() == first.dim() == 1 else first.shape[:-1]
        counted = torch.Size(positions).numel()
    # Nothing that counts is a loss of zero, not 0/0.
    return first, second, max(counted, 1) if count is None else count
