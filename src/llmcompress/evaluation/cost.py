"""What models cost, all of it measured on them together: bytes, operations, time, energy, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data import longest_input
from ..errors import ConfigError
from .flops import Flops, count_flops
from .generation_latency import GenerationLatency, check_generates, check_length, generates, measure_generation
from .latency import Latency, measure_latencies
from .memory import Memory, measure_memory
from .size import Size, measure_size
from .tasks.task import check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Shape = tuple[int, int]
"""Rows and tokens of a batch; for generation the tokens of the prompt and the new ones."""

LATENCY_GRID: tuple[Shape, ...] = ((1, 128), (8, 128))
"""Where latency is measured if nothing else is asked for: a single text, and a batch."""

MEMORY_TOKENS = 128
"""Tokens of the one row at which peak memory is measured."""

GENERATION_GRID: tuple[Shape, ...] = ((128, 16),)
"""Where generation is measured if nothing else is asked for."""


@dataclass(frozen=True)
class CostPlan:
    """What is to be measured; made before any work, so that a bad request is refused at once.

    Attributes:
        latency: shapes at which the forward pass is timed.
        generation: (prompt, new) tokens at which generation is timed.
        memory: whether peak memory is measured.
        threads: intra-op threads of torch while models are timed; None leaves them.
    """

    latency: tuple[Shape, ...]
    generation: tuple[Shape, ...]
    memory: bool
    threads: int | None


@dataclass(frozen=True)
class Cost:
    """What one model costs; fields as in `Evaluation`."""

    size: Size
    flops: Flops | None
    latency: tuple[Latency, ...]
    generation: tuple[GenerationLatency, ...]
    memory: Memory | None


def plan_costs(
    models: Mapping[str, PreTrainedModel],
    *,
    latency: bool | Sequence[Shape] = True,
    generation: bool | Sequence[Shape] | None = None,
    memory: bool = False,
    threads: int | None = None,
) -> CostPlan:
    """Check what is asked for against what the models can take; arguments as `evaluate`.

    Raises:
        ConfigError: `memory` is no bool, or a shape is not a pair of positive integers or longer than a model can take.
        UnsupportedModelError: generation is asked for, and a model does not generate.
    """
    check_positive("threads", threads)
    if not isinstance(memory, bool):
        raise ConfigError(f"memory must be True or False, got {memory!r}.")
    shapes = _latency_grid(latency, models)
    if generation is None:
        generation = bool(shapes) and all(generates(model) for model in models.values())
    return CostPlan(shapes, _generation_grid(generation, models), memory, threads)


def measure_costs(
    models: Mapping[str, PreTrainedModel], sources: Mapping[str, object], plan: CostPlan, *, progress: bool = True
) -> dict[str, Cost]:
    """Measure all `models` as planned; in what is timed they take turns.

    Args:
        models: by name.
        sources: the folder each was loaded from, or anything else.
        plan: what to measure.
        progress: whether bars are shown.
    """
    timed = [
        measure_latencies(models, batch_size=rows, tokens=tokens, threads=plan.threads, progress=progress)
        for rows, tokens in plan.latency
    ]
    written = [
        measure_generation(models, prompt_tokens=prompt, new_tokens=new, threads=plan.threads, progress=progress)
        for prompt, new in plan.generation
    ]
    return {
        name: Cost(
            size=measure_size(model, sources[name]),
            flops=count_flops(model, batch_size=plan.latency[0][0], tokens=plan.latency[0][1])
            if plan.latency
            else None,
            latency=tuple(at_shape[name] for at_shape in timed),
            generation=tuple(at_shape[name] for at_shape in written),
            memory=_memory(model, sources[name]) if plan.memory else None,
        )
        for name, model in models.items()
    }


def _memory(model: PreTrainedModel, source: object) -> Memory:
    is_folder = isinstance(source, (str, Path)) and (Path(source) / "config.json").is_file()
    # As many tokens as latency is timed at by default, and as few where the model takes no more.
    tokens = min(MEMORY_TOKENS, longest_input(model) or MEMORY_TOKENS)
    return measure_memory(str(source) if is_folder else model, tokens=tokens, device=str(model.device))


def _latency_grid(asked: bool | Sequence[Shape], models: Mapping[str, PreTrainedModel]) -> tuple[Shape, ...]:
    """Return the shapes to time; those of the default are cut to what the models can take."""
    if asked is False:
        return ()
    limits = [limit for model in models.values() if (limit := longest_input(model)) is not None]
    if asked is True:
        return tuple(dict.fromkeys((rows, min([tokens, *limits])) for rows, tokens in LATENCY_GRID))
    shapes = _pairs("latency", asked, "(rows, tokens) pairs such as (1, 128)", least=1)
    for shape in shapes:
        if shape[1] > min(limits, default=shape[1]):
            raise ConfigError(f"latency must be at most {min(limits)} tokens for these models, got {shape!r}.")
    return shapes


def _generation_grid(asked: bool | Sequence[Shape], models: Mapping[str, PreTrainedModel]) -> tuple[Shape, ...]:
    if asked is False:
        return ()
    for model in models.values():
        check_generates(model)
    most = min([limit for model in models.values() if (limit := longest_input(model)) is not None], default=None)
    if asked is True:
        # Of a model for short texts, half of what it can take may be new.
        return tuple(
            (prompt, new) if most is None or prompt + new <= most else (most - min(new, most // 2), min(new, most // 2))
            for prompt, new in GENERATION_GRID
        )
    shapes = _pairs("generation", asked, "(prompt, new) tokens such as (128, 32), new at least 2", least=2)
    for prompt, new in shapes:
        for model in models.values():
            check_length(model, prompt, new)
    return shapes


def _pairs(who: str, asked: Sequence[Shape], wanted: str, *, least: int) -> tuple[Shape, ...]:
    """Return `asked` as tuples, after refusing what are no pairs of counts; `least` is for the second of a pair."""
    found: list[Shape] = []
    for shape in asked if isinstance(asked, Sequence) and not isinstance(asked, str) else (asked,):
        pair = tuple(shape) if isinstance(shape, Sequence) else ()
        whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
        if len(pair) != 2 or not whole or pair[0] < 1 or pair[1] < least:
            raise ConfigError(f"{who} must be True, False, or {wanted}, got {shape!r}.")
        found.append((pair[0], pair[1]))
    return tuple(found)
