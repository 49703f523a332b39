"""Which channels stay: the dearest of each group, or the dearest of all groups together with a floor for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from ..anatomy.groups import Group
from ..anatomy.masking import masked
from .widths import Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def choose(
    model: PreTrainedModel,
    widths: Widths,
    score: Callable[[], list[torch.Tensor]],
    *,
    rounds: int,
    floor: float | None,
    multiple: int,
) -> list[tuple[Group, torch.Tensor]]:
    """Return what each group keeps; with several rounds the channels gone so far are masked while the next is scored.

    Args:
        model: the model; with several rounds, channels that go are zeroed on the way.
        widths: the groups, and how many channels each keeps.
        score: returns one tensor of scores for each group, of the model as it then is; they are written into.
        rounds: after each, the same share of what is to go is gone.
        floor: share that each group keeps at least when all groups of a kind compete, by the scores of the first round;
            None lets none compete.
        multiple: what the widths of groups that compete are rounded to.

    Returns:
        The groups that lose channels, each with those that it keeps.
    """
    kept = widths.kept
    chosen: list[tuple[Group, torch.Tensor]] = []
    for number in range(1, rounds + 1):
        with masked(model, chosen):
            scores = score()
        for values, (_, keep) in zip(scores, chosen, strict=False):
            values.masked_fill_(torch.ones_like(values, dtype=torch.bool).scatter_(-1, keep, False), -torch.inf)
        if floor is not None and number == 1:
            kept = _compete(widths, scores, floor, multiple)
        chosen = []
        for group, values, final in zip(widths.groups, scores, kept, strict=True):
            now = group.count - (group.count - final) * number // rounds
            now -= now % group.balance if number < rounds else 0
            chosen.append((group, dearest(group, values, max(now, final))))
    return [(group, keep) for group, keep in chosen if keep.shape[-1] < group.count]


def dearest(group: Group, scores: torch.Tensor, kept: int) -> torch.Tensor:
    """Return the `kept` channels of the highest scores, ascending; in equal numbers from each run of `group.balance`.

    Args:
        group: the channels.
        scores: shape (count,) or (experts, count).
        kept: how many stay (of each expert).

    Returns:
        Shape (kept,) or (experts, kept).

    Example:
        >>> dearest(Group("ffn", "mlp", 4, ()), torch.tensor([0.1, 0.9, 0.2, 0.8]), 2).tolist()
        [1, 3]
        >>> dearest(Group("query_heads", "attn", 4, (), balance=2), torch.tensor([0.9, 0.8, 0.2, 0.1]), 2).tolist()
        [0, 2]
    """
    if group.balance > 1:
        runs = scores.view(group.balance, -1)
        inside = runs.topk(kept // group.balance, dim=-1).indices.sort(dim=-1).values
        return (inside + torch.arange(group.balance)[:, None] * runs.shape[1]).flatten()
    return scores.topk(kept, dim=-1).indices.sort(dim=-1).values


def shared_out(
    groups: Sequence[Group], scores: Sequence[torch.Tensor], *, share: float, floor: float, multiple: int
) -> list[int]:
    """Return how many channels each group keeps when all compete for one total.

    Scores are compared as shares of their group's mean, since groups of different layers have different scales. Each
    group keeps at least `floor` of its channels, and a multiple of `multiple` where its count allows one.

    Args:
        groups: groups of one kind.
        scores: one score a channel for each group, shape (count,) or (experts, count).
        share: share of all channels that goes.
        floor: share that each group keeps at least.
        multiple: what the numbers are rounded to.

    Example:
        >>> a, b = Group("ffn", "a", 4, ()), Group("ffn", "b", 4, ())
        >>> spread, even = torch.tensor([9.0, 1.0, 1.0, 1.0]), torch.tensor([3.0, 3.0, 3.0, 3.0])
        >>> shared_out([a, b], [spread, even], share=0.375, floor=0.25, multiple=1)
        [1, 4]
    """
    relative = [
        (score.mean(0) if score.dim() == 2 else score).sort(descending=True).values / score.mean().clamp(min=1e-12)
        for score in scores
    ]
    least = [max(1, round(floor * group.count)) for group in groups]
    # The dearest channels of each group stay whatever the others have.
    open_to_all = torch.cat([values[low:] for values, low in zip(relative, least, strict=True)])
    owner = torch.cat([torch.full((len(v) - low,), i) for i, (v, low) in enumerate(zip(relative, least, strict=True))])
    left = max(round((1 - share) * sum(group.count for group in groups)) - sum(least), 0)
    winners = owner[open_to_all.topk(min(left, len(owner))).indices]
    counts = [low + int((winners == index).sum()) for index, low in enumerate(least)]
    return [_rounded(count, group, multiple) for count, group in zip(counts, groups, strict=True)]


def _compete(widths: Widths, scores: list[torch.Tensor], floor: float, multiple: int) -> list[int]:
    kept = list(widths.kept)
    for kind in {group.kind for group in widths.groups}:
        places = [index for index, group in enumerate(widths.groups) if group.kind == kind]
        counts = shared_out(
            [widths.groups[index] for index in places],
            [scores[index] for index in places],
            share=widths.asked[kind],
            floor=floor,
            multiple=multiple if kind in ("ffn", "hidden") else 1,
        )
        for index, count in zip(places, counts, strict=True):
            kept[index] = count
    return kept


def _rounded(count: int, group: Group, multiple: int) -> int:
    multiple = multiple * group.balance if group.balance > 1 else multiple
    return min(max(round(count / multiple), 1) * multiple, group.count)
