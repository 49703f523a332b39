"""The outcome of a search in one sentence: what was reached, or what is the nearest that can be."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..evaluation.units import bytes_text, milliseconds_text
from .search import Found
from .targets import Targets, drop_text
from .trial import Cost, Trial

if TYPE_CHECKING:
    from ..evaluation.tasks import TaskScore


def sentence_of(targets: Targets, found: Found, own: Cost, final: Trial, base: TaskScore, *, met: bool) -> str:
    """Say what came of it.

    Args:
        targets: what was asked for.
        found: how the search ended.
        own: what the original costs.
        final: the chain that is the result, measured.
        base: the original's score on the examples held out.
        met: whether all of it holds.
    """
    assert final.cost is not None
    assert final.drop is not None
    asked = f"{targets.text()} with a loss of at most {drop_text(targets.max_drop, base)}"
    is_now = f"{final.chain.name}: {_cost_text(final.cost, own)}, {_loss_text(final, base)}"
    if met:
        return f"Met: {asked}. {is_now}."
    if not found.feasible:
        return f"Not met: {asked}: {_never(targets, found, own)}. The nearest found: {is_now}."
    held = targets.hold(final.cost.bytes, final.cost.ms, final.cost.speedup)
    why = (
        f"it {'loses more' if math.isfinite(final.drop) else 'cannot be shown to lose no more'} than "
        f"{drop_text(targets.max_drop, base)} on the examples held out"
        if held
        else "no chain that was tried in this time is so small or fast and loses so little"
    )
    return f"Not met: {asked}: {why}. The nearest found: {is_now}."


def _never(targets: Targets, found: Found, own: Cost) -> str:
    """Say which limit no chain keeps; or where one keeps each, that none is expected to keep all with some margin."""
    limits = {"bytes": targets.size, "ms": None if own.ms is None else targets.milliseconds(own.ms)}
    above = [
        bytes_text(value) if cost == "bytes" else f"{milliseconds_text(value)} a pass"
        for cost, value in found.least.items()
        if (limit := limits[cost]) is not None and value > limit
    ]
    if above:
        return f"no chain of these strategies comes below {' and '.join(above)}"
    asked = [name for cost, name in (("bytes", "small"), ("ms", "fast")) if limits[cost] is not None]
    return f"no chain of these strategies is expected to be so {' and so '.join(asked)}{' at once' * (len(asked) > 1)}"


def _cost_text(cost: Cost, own: Cost) -> str:
    text = f"{bytes_text(cost.bytes)} on disk, {own.bytes / cost.bytes:.1f}x smaller"
    if cost.ms is not None and cost.speedup is not None:
        text += f", {milliseconds_text(cost.ms)} a pass, {cost.speedup:.2f}x faster"
    return text


def _loss_text(final: Trial, base: TaskScore) -> str:
    assert final.drop is not None
    if not math.isfinite(final.drop):
        return f"the loss of {base.primary} cannot be told ({final.drop})"
    noise = drop_text(final.noise, base)
    if final.drop < 0:
        return f"{base.primary} is {drop_text(-final.drop, base)} better (± {noise})"
    return f"{base.primary} is {drop_text(final.drop, base)} worse (± {noise})"
