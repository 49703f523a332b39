"""Soft losses: how far the student's distribution over the classes is from the teacher's.

All take logits (..., classes) of student and teacher, of which the teacher's get no gradient, divide both by the
temperature, sum over the classes and over the positions that count, and divide by `count` (see `positions.counted`).
They are multiplied by the square of the temperature, which keeps the gradient's size the same at any temperature
(Hinton et al., arXiv 1503.02531), so that it can be weighed against a hard loss; `tvd`, whose gradient shrinks with the
temperature itself and not with its square, by the temperature.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from .positions import Count, counted


def forward_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(teacher || student) (Hinton et al., arXiv 1503.02531), in nats: the student covers all that is said.

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
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    return _kl(theirs, ours) * temperature**2 / count


def reverse_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(student || teacher) (MiniLLM, arXiv 2306.08543), in nats: the student says what the teacher is sure of.

    Arguments as of `forward_kl`.

    Example:
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> round(float(reverse_kl(sure, unsure)), 3), round(float(reverse_kl(unsure, sure)), 3)
        (0.692, 3.807)
    """
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    return _kl(ours, theirs) * temperature**2 / count


def jsd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return the generalised Jensen-Shannon divergence of GKD (Agarwal et al., arXiv 2306.13649), in nats.

    `beta` KL(teacher || m) + (1 - `beta`) KL(student || m), of the mixture m = `beta` teacher + (1 - `beta`) student.
    Near `beta` 0 this is `beta` x forward KL, near 1 it is (1 - `beta`) x reverse KL; at 0 and 1, where it would
    vanish, it is the forward and the reverse KL themselves.

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape; they get no gradient.
        beta: the teacher's share of the mixture, in [0, 1]; 0.5 is the symmetric divergence.
        temperature: both logits are divided by it; above 0.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> bool(jsd(one, other, beta=0.0) == forward_kl(one, other))
        True
    """
    if beta in (0, 1):
        return (forward_kl, reverse_kl)[int(beta)](student, teacher, temperature=temperature, mask=mask, count=count)
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    mixture = _mixture(theirs, ours, beta)
    return (beta * _kl(theirs, mixture) + (1 - beta) * _kl(ours, mixture)) * temperature**2 / count


def skew_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(teacher || `skew` teacher + (1 - `skew`) student) (DistiLLM, arXiv 2402.03898), in nats.

    Mixing the teacher in bounds the loss by -ln(`skew`), and its gradient where the student gives a token no chance.

    Args:
        student: logits (..., classes).
        teacher: logits of the same shape; they get no gradient.
        skew: the teacher's share of the mixture, in [0, 1); 0 is the forward KL.
        temperature: both logits are divided by it; above 0.
        mask: which positions (...) count; None counts all.
        count: what to divide by; None is the number of positions that count here.

    Example:
        >>> sure, wrong = torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 99.0]])
        >>> round(float(skew_kl(wrong, sure, skew=0.5)), 3)
        0.693
    """
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    return _kl(theirs, _mixture(theirs, ours, skew)) * temperature**2 / count


def skew_reverse_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    skew: float = 0.1,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(student || `skew` student + (1 - `skew`) teacher) (DistiLLM, arXiv 2402.03898), in nats.

    Arguments as of `skew_kl`; `skew` is the student's share of the mixture, and 0 is the reverse KL.

    Example:
        >>> one, other = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 1.0, 0.0]])
        >>> bool(skew_reverse_kl(one, other, skew=0.0) == reverse_kl(one, other))
        True
    """
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    return _kl(ours, _mixture(ours, theirs, skew)) * temperature**2 / count


def tvd(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return the total variation distance, half the sum of absolute differences (arXiv 2307.15190), times temperature.

    In [0, 1] at temperature 1. Arguments as of `forward_kl`.

    Example:
        >>> round(float(tvd(torch.tensor([[99.0, 0.0]]), torch.tensor([[0.0, 0.0]]))), 3)
        0.5
    """
    ours, theirs, count = _log_probabilities(student, teacher, temperature, mask, count)
    return (ours.exp() - theirs.exp()).abs().sum() / 2 * temperature / count


def mse(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return the squared distance of the logits, summed over the classes (Kim et al., arXiv 2105.08919).

    The temperature, whose square the loss is multiplied by, drops out. The sum grows with the number of classes: it
    suits classifiers. Arguments as of `forward_kl`.

    Example:
        >>> float(mse(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]]), temperature=4.0))
        5.0
    """
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    return (student.float() - teacher.float()).square().sum() / count


def _log_probabilities(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, mask: torch.Tensor | None, count: Count
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    student, teacher, count = counted(student, teacher.detach(), mask, count)
    ours = functional.log_softmax(student.float() / temperature, dim=-1)
    return ours, functional.log_softmax(teacher.float() / temperature, dim=-1), count


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return KL(first || second), summed, of log-probabilities."""
    return functional.kl_div(second, first, reduction="sum", log_target=True)


def _mixture(first: torch.Tensor, second: torch.Tensor, share: float) -> torch.Tensor:
    """Return the log-probabilities of `share` x first + (1 - `share`) x second."""
    if share == 0:
        return second
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))
