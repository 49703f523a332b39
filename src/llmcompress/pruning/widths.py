"""How many channels each group shall keep: what was asked for, the nearest that is legal, and how a config tells it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..anatomy import Anatomy, anatomy
from ..anatomy.coupling import expert_groups, feed_forward_groups, head_groups, query_head_groups
from ..anatomy.groups import Group, Kind, new_shapes
from ..anatomy.independence import independent
from ..anatomy.residual import residual_group
from ..anatomy.sizes import solve_config
from ..errors import ConfigError, NothingToCompressError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# How many other sizes are tried where the nearest one is not legal.
_MOST_TRIES = 48
# How many hidden sizes next to the one asked for are among them.
_MOST_SIZES = 16


_SIZE_OF = {"ffn": "FFN width", "hidden": "hidden size"}


@dataclass(frozen=True)
class Widths:
    """What a structural step is about to do.

    Attributes:
        body: the model's parts.
        groups: all groups that are cut.
        kept: how many channels each group keeps, in the order of `groups`.
        values: config attributes that tell the new sizes; empty where the config keeps the old ones.
        asked: for each kind, the share that was asked for.
        left: by path, why parts of these kinds are left alone.
    """

    body: Anatomy
    groups: list[Group]
    kept: list[int]
    values: dict[str, Any] = field(default_factory=dict)
    asked: dict[Kind, float] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    @property
    def changed(self) -> list[tuple[Group, int]]:
        """The groups that lose a channel, with what they keep."""
        return [(group, kept) for group, kept in zip(self.groups, self.kept, strict=True) if kept < group.count]


def find_widths(
    model: PreTrainedModel, shares: Mapping[Kind, float], *, multiple: int, uniform: bool, who: str
) -> Widths:
    """Return how many channels each group keeps once `shares` of each kind are gone.

    Args:
        model: the model; its weights are not read.
        shares: share of the channels of each kind to remove, in (0, 1).
        multiple: widths are multiples of this; heads and experts are whole numbers.
        uniform: take the nearest sizes that a plain config can tell; else the sizes asked for.
        who: the strategy, for messages.

    Raises:
        UnsupportedModelError: the model has no such part, or no config tells the sizes.
        NothingToCompressError: nothing gets smaller.
        ConfigError: fewer experts than a token is sent to.
    """
    body = anatomy(model)
    groups, left = _groups(model, body, shares, who)
    choices = [_choices(body, kind, found, shares[kind], multiple, uniform, who) for kind, found in groups.items()]
    flat = [group for found in groups.values() for group in found]
    first = [kept for choice in choices for kept in choice[0]]
    if all(kept == group.count for group, kept in zip(flat, first, strict=True)):
        if set(shares) == {"heads"} and {group.count for group in flat} == {1}:
            raise NothingToCompressError(
                f"{who}.heads finds one key and value head in each attention of {type(model).__name__}, which must "
                f"stay; use query_heads."
            )
        told = ", ".join(f"{kind}={share}" for kind, share in shares.items())
        sizes = ", ".join(str(count) for count in sorted({group.count for group in flat}))
        raise NothingToCompressError(
            f"{who}({told}, round_to={multiple}) leaves every width of {type(model).__name__} as it is ({sizes}); "
            f"lower round_to or raise {next(iter(shares))}."
        )
    if not uniform:
        return Widths(body, flat, first, asked=dict(shares), left=left)
    refusal: UnsupportedModelError | None = None
    ranked = sorted(itertools.product(*(range(len(choice)) for choice in choices)), key=sum)
    for picks in ranked[:_MOST_TRIES]:
        kept = [count for choice, pick in zip(choices, picks, strict=True) for count in choice[pick]]
        try:
            values = _solve(model, body, list(zip(flat, kept, strict=True)), tuple(shares))
        except UnsupportedModelError as error:
            refusal = refusal or error
            continue
        return Widths(body, flat, kept, values, dict(shares), left)
    assert refusal is not None
    raise refusal


def _groups(
    model: PreTrainedModel, body: Anatomy, shares: Mapping[Kind, float], who: str
) -> tuple[dict[Kind, list[Group]], dict[str, str]]:
    """Return the groups of each kind, and by path why others of that kind are left alone."""
    found: dict[Kind, list[Group]] = {}
    left: dict[str, str] = {}
    for kind in shares:
        if kind == "ffn":
            found[kind] = feed_forward_groups(body)
            if not found[kind]:
                raise NothingToCompressError(
                    f"{who} finds no feed-forward network in {type(model).__name__}; its blocks hold: "
                    f"{', '.join(body.blocks()[0].others) or 'attentions only'}."
                )
        elif kind == "heads":
            found[kind], bound = independent(model, head_groups(model, body))
            left.update(bound)
        elif kind == "query_heads":
            found[kind], bound = independent(model, query_head_groups(model, body))
            left.update(bound)
        elif kind == "experts":
            found[kind] = expert_groups(model, body)
        else:
            found[kind] = [residual_group(model, body)]
    return found, left


def _choices(
    body: Anatomy, kind: Kind, groups: list[Group], share: float, multiple: int, uniform: bool, who: str
) -> list[list[int]]:
    """Return what the groups of one kind may keep, the nearest to what is asked for first."""
    largest = max(group.count // group.balance for group in groups)
    if kind in ("ffn", "hidden"):
        units = [_multiple(group, multiple) for group in groups]
        nearest = [
            min(max(round(group.count * (1 - share) / unit), 1) * unit, group.count)
            for group, unit in zip(groups, units, strict=True)
        ]
        if kind == "hidden" and uniform:
            # Configs refuse some hidden sizes, such as those that are no multiple of the number of heads.
            legal = range(units[0], groups[0].count, units[0])
            return [
                nearest,
                *([size] for size in sorted(legal, key=lambda size: abs(size - nearest[0]))[1:_MOST_SIZES]),
            ]
        return [nearest]
    least = 1
    if kind == "experts":
        known = [mixture.top_k for block in body.blocks() for mixture in block.experts]
        least = max((top_k for top_k in known if top_k), default=1)
        if round(largest * (1 - share)) < least:
            raise ConfigError(
                f"{who}.experts must leave at least the {least} experts that each token is sent to, got {share}: "
                f"{round(largest * (1 - share))} of {largest} would stay; lower experts."
            )
    wanted = largest * (1 - share)
    others = sorted(range(least, largest), key=lambda count: (abs(count - wanted), -count))
    nearest_first = [max(round(wanted), least), *(count for count in others if count != max(round(wanted), least))]
    if not uniform:
        nearest_first = nearest_first[:1]
    return [
        [max(round(group.count // group.balance * count / largest), 1) * group.balance for group in groups]
        for count in nearest_first
    ]


def _multiple(group: Group, multiple: int) -> int:
    # torch's grouped product over experts takes rows of whole 16 bytes only: 8 elements in half precision.
    return math.lcm(multiple, 8) if group.experts else multiple


def _solve(
    model: PreTrainedModel, body: Anatomy, plan: Sequence[tuple[Group, int]], kinds: tuple[Kind, ...]
) -> dict[str, Any]:
    sizes: dict[int, set[int]] = {}
    for group, kept in plan:
        for length in group.lengths:
            new = length * kept // group.count
            sizes.setdefault(length, set()).add(new)
            if group.kind == "ffn" and length % body.hidden == 0 and new % body.hidden == 0:
                # Some configs tell the width as so many times the hidden size.
                sizes.setdefault(length // body.hidden, set()).add(new // body.hidden)
    expected = _outline(body, plan)
    head_dims = {attention.head_dim for block in body.blocks() for attention in block.attentions}
    # Where the size of a head follows from the number of heads, many models let a config fix it instead.
    fixed = (
        {"head_dim": head_dims.pop()} if len(head_dims) == 1 and set(kinds) & {"heads", "query_heads", "hidden"} else {}
    )
    return solve_config(
        model,
        new_shapes(model, plan),
        {old: sorted(news) for old, news in sizes.items()},
        what=" and ".join(_SIZE_OF.get(kind, f"number of {kind}") for kind in kinds),
        unset=fixed,
        agrees=lambda reference: _outline(anatomy(reference), ()) == expected,
    )


def _outline(body: Anatomy, plan: Sequence[tuple[Group, int]]) -> list[tuple[int, ...]]:
    """Return heads, key heads and head size of each attention, and each mixture's experts, once `plan` is done."""
    shares = {
        (scope, group.kind): (kept, group.count) for group, kept in plan for scope in group.scopes or (group.path,)
    }
    outline: list[tuple[int, ...]] = []
    for block in body.blocks():
        for attention in block.attentions:
            kept, of = shares.get((attention.path, "heads"), (1, 1))
            query, queries = shares.get((attention.path, "query_heads"), (1, 1))
            heads = attention.heads * kept // of * query // queries
            outline.append((heads, attention.kv_heads * kept // of, attention.head_dim))
        for mixture in block.experts:
            kept, of = shares.get((mixture.path.rpartition(".")[0], "experts"), (1, 1))
            outline.append((mixture.count * kept // of,))
    return outline
