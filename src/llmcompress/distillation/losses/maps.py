"""How far the student looks from where the teacher looks: attention maps, and relations between tokens."""

from __future__ import annotations

import torch
from torch.nn import functional

from .positions import Count, counted


def attention_kl(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return KL(teacher || student) of attention maps (MiniLM, arXiv 2002.10957), in nats a token, averaged over heads.

    Args:
        student: attention probabilities (rows, heads, queries, keys); those of padded keys are 0.
        teacher: of the same shape; they get no gradient.
        mask: which queries (rows, queries) count; None counts all.
        count: what to divide by; None is the number of queries that count here.

    Example:
        >>> even = torch.full((1, 2, 3, 4), 0.25)
        >>> float(attention_kl(even, even))
        0.0
    """
    heads = student.shape[1]
    student, teacher, count = _queries(student, teacher, mask, count)
    smallest = torch.finfo(student.dtype).tiny
    error = teacher * (teacher.clamp(min=smallest).log() - student.clamp(min=smallest).log())
    return error.sum() / heads / count


def attention_mse(
    student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None, count: Count = None
) -> torch.Tensor:
    """Return the squared distance of attention maps (after TinyBERT, arXiv 1909.10351) a token, averaged over heads.

    Summed over the keys: a mean would depend on how far a batch is padded. Arguments as of `attention_kl`.

    Example:
        >>> left, right = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
        >>> float(attention_mse(left, right))
        2.0
    """
    heads = student.shape[1]
    student, teacher, count = _queries(student, teacher, mask, count)
    return (student - teacher).square().sum() / heads / count


def relation_kl(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    heads: int,
    mask: torch.Tensor | None = None,
    count: Count = None,
) -> torch.Tensor:
    """Return KL(teacher || student) of the relations between tokens (MiniLMv2, arXiv 2012.15828), in nats a token.

    The relations of queries, say, are softmax(q q' / sqrt(width of a head)): each token's distribution over the tokens,
    a relation head. Both sides are split into equally many heads, whatever their widths: so a student of another width
    needs no projection. Averaged over the heads.

    Args:
        student: queries, keys or values of all heads side by side (rows, tokens, width).
        teacher: of the same rows and tokens, of any width; they get no gradient.
        heads: relation heads; they divide both widths.
        mask: which tokens (rows, tokens) count, as those that relate and as those that are related to; None: all.
        count: what to divide by; None is the number of tokens that count here.

    Example:
        >>> torch.manual_seed(0) and None
        >>> narrow, wide = torch.randn(2, 5, 8), torch.randn(2, 5, 24)
        >>> bool(relation_kl(narrow, wide, heads=4) > 0)
        True
    """
    ours, theirs = (_relations(side, heads, mask) for side in (student, teacher.detach().to(student.device)))
    ours, theirs, count = _queries(ours, theirs, mask, count)
    return functional.kl_div(ours, theirs, reduction="sum", log_target=True) / heads / count


def relation_heads(student: int, teacher: int, *, narrowest: int = 16) -> int:
    """Return into how many relation heads vectors of these widths are split.

    The most that divide both widths and leave the teacher's heads at least `narrowest` wide: MiniLMv2 (arXiv
    2012.15828) does best with 48 heads of 16 for a width of 768, and 64 of 16 for 1024.

    Example:
        >>> relation_heads(384, 768), relation_heads(768, 1024), relation_heads(64, 63)
        (48, 64, 1)
    """
    most = max(teacher // narrowest, 1)
    return max(heads for heads in range(1, most + 1) if student % heads == 0 and teacher % heads == 0)


def _relations(vectors: torch.Tensor, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
    rows, tokens, width = vectors.shape
    split = vectors.float().view(rows, tokens, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / (width // heads) ** 0.5
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)


def _queries(
    student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor | None, count: Count
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Keep the queries that count, each with its row of every head side by side (..., heads x keys)."""
    student, teacher = (maps.transpose(1, 2).flatten(2).float() for maps in (student, teacher.detach()))
    return counted(student, teacher, mask, count)
