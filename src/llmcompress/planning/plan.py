"""`plan`: what `compress` would do, told without reading or changing a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..anatomy.empty import weightless
from ..anatomy.footprint import footprint
from ..compressor import Context, Outline
from ..errors import ConfigError
from ..inputs import check_inputs, check_seed, refuse_unready
from ..measured import outline_step, plan_step, seeded, unloadable
from ..pipeline import Pipeline, Step
from ..quantization.kernels.dispatch import kernels
from ..quantization.modules import QuantizedModule
from ..result import TOLD_ZEROS
from .document import Plan, PlannedSize, PlannedStep
from .loading import loadings
from .opening import open_weightless
from .rates import machine_rates

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def plan(
    model: PreTrainedModel | PreTrainedConfig | str | Path,
    steps: Step | Sequence[Step],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    recover: Step | None = None,
    seed: int = 0,
) -> Plan:
    """Tell what `compress` would do to `model`: what it touches, what it leaves, and how big the result is.

    The steps run on a model without weights, so that each sees the sizes that the earlier ones will leave. Parameters
    and bytes on disk are those of the real run, exactly, unless the plan calls them estimates.

    Args:
        model: a transformers model, a config that names its class in `architectures`, a folder or a name on the hub; of
            a folder only the config is read.
        steps: as for `compress`.
        data: as for `compress`; what a step counts in them is counted.
        tokenizer: as for `compress`.
        recover: as for `compress`.
        seed: as for `compress`.

    Returns:
        The plan: `print(plan)`, a table in a notebook, `plan.model_dump_json()`.

    Raises:
        CompressionError: whatever `compress` would raise before any work, and where it is known what a later step finds
            nothing to do, that as well.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> found = lc.plan(tiny_model("llama"), [lc.StructuredPruning(ffn=0.5), lc.DynamicQuantization()])
        >>> [(step.name, step.size.parameters, step.size.disk_bytes) for step in found.steps]
        [('structured_pruning', 57664, 232704), ('dynamic_quantization', 57664, 65608)]
    """
    check_seed(seed, "plan.seed")
    chain = Pipeline(steps=steps, recover=recover)
    flat = chain.flatten()
    if not flat:
        raise ConfigError("plan() must have at least one step, got none; pass steps=[lc.DynamicQuantization()].")
    original = open_weightless(model)
    refuse_unready(original)
    examples, tokenizer = check_inputs(original, flat, data, tokenizer, None, False)
    # What is in memory may be asked more than what is not: which weights its code reads itself, for instance.
    known = model if isinstance(model, transformers.PreTrainedModel) else original
    context = Context(
        data=examples,
        tokenizer=tokenizer,
        teacher=known,
        seed=seed,
        device="cpu" if known.device.type == "meta" else known.device,
        progress=False,
    )
    with seeded(seed):
        base = _size(original)
        current: PreTrainedModel | None = weightless(original)
        planned: list[PlannedStep] = []
        gives_not: list[str] = []
        for index, step in enumerate(flat):
            if index == 0 or current is None:
                actions = plan_step(step, known, replace(context, history=[], told=[], corrected=set()))
                actions += unloadable(known)
            else:
                actions = plan_step(step, current, context)
            before = planned[-1].size if planned else base
            standing = base.memory_bytes + (before.memory_bytes if before is not None else 0)
            outline = None if current is None else outline_step(step, current, context)
            current = None if outline is None else outline.model
            found = context.findings([*actions, *chain._remarks(step)])
            after = None if current is None else _size(current)
            planned.append(
                PlannedStep(
                    step=step.to_dict(),
                    size=after,
                    peak_bytes=None if outline is None else standing + outline.scratch,
                    rough_seconds=None if outline is None else _rough_seconds(outline, str(context.device)),
                    estimated=None if outline is None else outline.estimated or outline.overlap or _inherited(planned),
                    touched=[action for action in found if action.touched],
                    left=[action for action in found if not action.touched],
                )
            )
            if before is not None and after is not None:
                gives_not += _gives_not(planned[-1].name, before, after)
    return Plan(
        model=type(original).__name__,
        recipe=chain.to_dict(),
        seed=seed,
        base=base,
        steps=planned,
        loads_in=[] if current is None else loadings(current),
        gives_not=gives_not,
        computed_by=[] if current is None else _kernels_told(current, torch.device(context.device).type),
    )


def _inherited(planned: Sequence[PlannedStep]) -> str | None:
    """Say so where a step starts from sizes that are estimates."""
    earlier = [step.name for step in planned if step.estimated is not None]
    return f"those that {earlier[0]} leaves are" if earlier else None


def _rough_seconds(outline: Outline, device: str) -> float:
    rates = machine_rates(device)
    return outline.flops / rates.flops + outline.swept / rates.swept


def _size(model: PreTrainedModel) -> PlannedSize:
    found = footprint(model)
    coded = any(isinstance(module, QuantizedModule) for module in model.modules())
    return PlannedSize(
        parameters=found.parameters,
        disk_bytes=found.disk_bytes,
        memory_bytes=found.memory_bytes,
        zeros=None if coded else found.zeros,
    )


def _gives_not(name: str, before: PlannedSize, after: PlannedSize) -> list[str]:
    """Say what a step does not give, where it changes no size."""
    if before.disk_bytes != after.disk_bytes:
        return []
    if after.zeros is not None and after.zeros - (before.zeros or 0.0) > TOLD_ZEROS:
        zeros = f"{after.zeros:.0%} of all weights zero"
        return [f"{name}: {zeros}: 0 % smaller on disk, 0 % faster here: dense tensors hold and multiply them"]
    return [f"{name}: 0 % smaller, 0 % faster: it changes values only"]


def _kernels_told(model: PreTrainedModel, device: str) -> list[str]:
    """Say for each form in which products' weights are stored what computes them on this machine."""
    schemes = {module.scheme for module in model.modules() if isinstance(module, QuantizedModule)}
    known = kernels()
    told = []
    for scheme in sorted(schemes):
        used = known.used(scheme, device)
        if used:
            told.append(f"{scheme} on this machine: {', '.join(used)}")
    return told
