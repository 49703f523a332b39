"""`bits="auto"`: the bits of each layer, chosen by what its rounding does to the model's answers."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, TypeVar

from ..compressor import Action, Context
from ..errors import ConfigError
from .measuring import measure
from .remarks import joined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .grouped import GroupedQuantization
    from .sensitivity_table import Sensitivity
    from .targets import Target

Step = TypeVar("Step", bound="GroupedQuantization")

# What the damages are measured on.
_SAMPLES, _LENGTH = 32, 256


def with_bits(step: Step, model: PreTrainedModel, context: Context) -> Step:
    """Return `step` with bits for each layer in `overrides`, and tell them to `context`.

    Args:
        step: a strategy with `bits="auto"`.
        model: the float model; the same afterwards.
        context: its data and tokenizer are used.

    Raises:
        ConfigError: `target_bits` is below what the fewest bits take, or `overrides` leave nothing to choose.
        MissingInputError: no data or tokenizer, or texts too short.
    """
    assert step.target_bits is not None
    free = free_targets(step, step._choose(model)[0])
    found = measure(
        model,
        context,
        [target.layer for target in free],
        step._grid_for,
        who=type(step).__name__,
        bits=step.auto_bits,
        fit=step._auto_fit,
        group_size=step.group_size,
        samples=_SAMPLES,
        max_length=_LENGTH,
        method="auto",
    )
    chosen = found.allocate(step.target_bits)
    first: dict[int, str] = {}
    owners = {target.layer.name: first.setdefault(id(target.layer.weight), target.layer.name) for target in free}
    bits = {name: chosen[owner] for name, owner in owners.items()}
    named = {glob.escape(name): width for name, width in bits.items()}
    usual = Counter(bits.values()).most_common(1)[0][0]
    fields = {**dict(step), "bits": usual, "target_bits": None, "overrides": {**step.overrides, **named}}
    resolved = type(step)(**fields)
    for action in resolved.plan(model, context):
        if action.path in bits:
            alone = f"alone it moves the answers by {found.damage(owners[action.path], bits[action.path]):.2g} nats"
            why = joined(action.reason, alone)
            context.tell(action.model_copy(update={"reason": why}), instead=True)
    context.tell(Action(path="", reason=_summary(found, chosen, step.target_bits)))
    return resolved


def at_target(step: GroupedQuantization, targets: Sequence[Target]) -> list[Target]:
    """Return the targets with as many bits as `target_bits` allows, whichever layers get them: what a plan counts."""
    assert step.target_bits is not None
    free = {id(target.layer.weight): target.layer for target in free_targets(step, targets)}
    stored = {
        (key, bits): step._grid_for(layer, bits).bits_a_weight(layer.weight.shape[layer.input_axis])
        * layer.weight.numel()
        for key, layer in free.items()
        for bits in step.auto_bits
    }
    room = step.target_bits * sum(layer.weight.numel() for layer in free.values())
    chosen = dict.fromkeys(free, min(step.auto_bits))
    room -= sum(stored[key, bits] for key, bits in chosen.items())
    for bits in step.auto_bits[1:]:
        for key, now in chosen.items():
            more = stored[key, bits] - stored[key, now]
            if more <= room:
                chosen[key], room = bits, room - more
    grids = {key: step._grid_for(layer, chosen[key]) for key, layer in free.items()}
    return [replace(target, grid=grids.get(id(target.layer.weight), target.grid)) for target in targets]


def free_targets(step: GroupedQuantization, targets: Sequence[Target]) -> list[Target]:
    """Return those whose bits `overrides` does not say."""
    named = {
        id(target.layer.weight)
        for target in targets
        if any(fnmatchcase(target.layer.name, pattern) for pattern in step.overrides)
    }
    return [target for target in targets if id(target.layer.weight) not in named]


def refuse_target(step: GroupedQuantization, free: Sequence[Target]) -> None:
    """Raise `ConfigError` where nothing can be chosen, before anything is measured."""
    who = type(step).__name__
    if not free:
        raise ConfigError(
            f"{who}.bits must be in [2, 8] where overrides name every layer, got 'auto', which has none to choose for."
        )
    fewest = min(step.auto_bits)
    stored = weights = 0.0
    for layer in {id(target.layer.weight): target.layer for target in free}.values():
        grid = step._grid_for(layer, fewest)
        stored += grid.bits_a_weight(layer.weight.shape[layer.input_axis]) * layer.weight.numel()
        weights += layer.weight.numel()
    if step.target_bits is not None and step.target_bits < stored / weights:
        raise ConfigError(
            f"{who}.target_bits must be at least {stored / weights:.4g} with group_size={step.group_size} and "
            f"auto_bits={step.auto_bits}, got {step.target_bits:g}: scales and zero points count; take a larger "
            f"group_size, or allow fewer bits."
        )


def _summary(found: Sensitivity, chosen: dict[str, int], target: float) -> str:
    how = "measured" if found.method == "kl" else "estimated from gradients"
    return (
        f"bits='auto' chose {found.bits_a_weight(chosen):.3f} stored bits a weight, of {target:g} at most; the "
        f"damages, {how} on {found.answers:,} answers, add up to {found.predicted(chosen):.3g} nats an answer"
    )
