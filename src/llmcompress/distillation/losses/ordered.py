"""A soft loss between distributions over different vocabularies, whose classes have no names in common."""

from __future__ import annotations

import torch
from torch.nn import functional

from .positions import Count, counted


def uld(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return the universal logit distillation loss (Boizard et al., arXiv 2402.12030), times the temperature.

    The probabilities of both are sorted, the shorter list is filled up with zeros, and their absolute differences are
    summed: the Wasserstein distance where every class is as far from every other. It compares how sure the teacher is,
    not of what; so it asks for labels beside it.

    Args:
        student: logits (..., classes).
        teacher: logits (..., other classes) of the same positions; they get no gradient.
        temperature: both logits are divided by it; above 0.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> round(float(uld(torch.tensor([[5.0, 1.0, 3.0]]), torch.tensor([[1.0, 3.0, 5.0]]))), 3)
        0.0
        >>> round(float(uld(torch.tensor([[99.0, 0.0]]), torch.zeros(1, 4))), 3)
        1.5
    """
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    ours, theirs = (
        torch.softmax(logits.float() / temperature, dim=-1).sort(dim=-1, descending=True).values
        for logits in (student, teacher)
    )
    missing = ours.shape[-1] - theirs.shape[-1]
    ours, theirs = functional.pad(ours, (0, max(-missing, 0))), functional.pad(theirs, (0, max(missing, 0)))
    return (ours - theirs).abs().sum() * temperature / count
