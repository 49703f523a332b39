"""Which work chains share, which of their orders are allowed, and the teacher's answers that all read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..compressor import Compressor
from ..distillation.cache import TeacherCache
from ..distillation.distillation import KnowledgeDistillation
from ..distillation.heads import LANGUAGE_MODELS, head_of
from ..errors import ConfigError, PipelineOrderError
from ..pipeline import Pipeline

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Six steps have 720 orders: more than anybody waits for.
_MOST_ORDERED = 5


@dataclass(frozen=True)
class Job:
    """A piece of work that one worker does: the steps from the model to where chains part, or to the end of one.

    Attributes:
        steps: all steps from the model on; those of the job before are read from disk.
        before: number of the job that must be finished first, or None.
        chains: names of the chains that end here.
    """

    steps: tuple[Compressor, ...]
    before: int | None
    chains: tuple[str, ...]


def plan_jobs(chains: Mapping[str, Pipeline]) -> list[Job]:
    """Cut chains into jobs such that no step is run twice; a job stands behind the one it needs.

    Args:
        chains: by name.

    Example:
        >>> import llmcompress as lc
        >>> half, int8 = lc.MagnitudePruning(sparsity=0.5), lc.DynamicQuantization()
        >>> jobs = plan_jobs({"sparse": lc.Pipeline(steps=[half]), "both": lc.Pipeline(steps=[half, int8])})
        >>> [(len(job.steps), job.before, job.chains) for job in jobs]
        [(1, None, ('sparse',)), (2, 0, ('both',))]
    """
    flat = {name: tuple(chain.flatten()) for name, chain in chains.items()}
    texts = {name: tuple(map(told, steps)) for name, steps in flat.items()}
    ends: dict[tuple[str, ...], list[str]] = {}
    for name, steps in texts.items():
        ends.setdefault(steps, []).append(name)
    # Chains part behind the steps that two of them have in common.
    cuts = {*ends, *(_common(one, other) for one, other in itertools.combinations(ends, 2))} - {()}
    ordered = sorted(cuts, key=lambda steps: (len(steps), min(_index(texts, steps))))
    steps_of = {texts[name][:count]: flat[name][:count] for name in flat for count in range(1, len(flat[name]) + 1)}
    jobs: list[Job] = []
    for steps in ordered:
        earlier = [number for number, cut in enumerate(ordered[: len(jobs)]) if steps[: len(cut)] == cut]
        before = max(earlier, key=lambda number: len(ordered[number]), default=None)
        jobs.append(Job(steps_of[steps], before, tuple(ends.get(steps, ()))))
    return jobs


def told(step: Compressor) -> str:
    """Return all that a step tells, as one text: two are the same step where theirs are equal."""
    return json.dumps(step.to_dict(), sort_keys=True)


def allowed_orders(steps: Sequence[Compressor]) -> dict[str, Pipeline]:
    """Return every order of the steps that a pipeline allows, by its text.

    Raises:
        ConfigError: no step, or more than five.
        PipelineOrderError: no order is allowed.

    Example:
        >>> import llmcompress as lc
        >>> steps = [lc.DynamicQuantization(), lc.MagnitudePruning(sparsity=0.5), lc.DepthPruning()]
        >>> for order in allowed_orders(steps):
        ...     print(order)
        magnitude_pruning, depth_pruning, dynamic_quantization
        depth_pruning, magnitude_pruning, dynamic_quantization
    """
    if not steps:
        raise ConfigError(
            "orders() must have at least one step, got none; pass [lc.DepthPruning(), lc.WandaPruning()]."
        )
    if len(steps) > _MOST_ORDERED:
        raise ConfigError(
            f"orders() must have at most {_MOST_ORDERED} steps, got {len(steps)}; make a Pipeline of those that stay "
            f"together."
        )
    found: dict[str, Pipeline] = {}
    refusal: PipelineOrderError | None = None
    names = _short_names(steps)
    for order in itertools.permutations(range(len(steps))):
        chain = Pipeline(steps=[steps[index] for index in order])
        try:
            chain.flatten()
        except PipelineOrderError as error:
            refusal = error
            continue
        found[", ".join(names[index] for index in order)] = chain
    if not found and refusal is not None:
        raise refusal
    return found


def with_answers(
    chains: Mapping[str, Pipeline], model: PreTrainedModel, answers: TeacherCache | None, folder: Path
) -> dict[str, Pipeline]:
    """Have the distillations of all chains read one teacher's answers.

    Args:
        chains: by name.
        model: the teacher.
        answers: the cache they read; None takes one in `folder` for what is exact: soft labels of other heads than
            language models, whose answers are kept whole.
        folder: where that one is.
    """
    if answers is None:
        if not any(_distils(chain) for chain in chains.values()) or head_of(model) in LANGUAGE_MODELS:
            return dict(chains)
        answers = TeacherCache(folder=str(folder), dtype="float32")
    return {name: _reading(chain, answers) for name, chain in chains.items()}


def _reading(chain: Pipeline, answers: TeacherCache) -> Pipeline:
    steps = [_reading(one, answers) if isinstance(one, Pipeline) else _read_by(one, answers) for one in chain.steps]
    recover = None if chain.recover is None else _read_by(chain.recover, answers)
    return chain.model_copy(update={"steps": tuple(steps), "recover": recover})


def _read_by(step: Compressor, answers: TeacherCache) -> Compressor:
    if not isinstance(step, KnowledgeDistillation) or step.cache is not None:
        return step
    inside = {name for name in step.features if name.startswith(("hidden", "embeddings"))}
    served = inside == set(step.features) and (not inside or bool(answers.hidden))
    anew = step.generation is not None and step.generation.way == "on_policy"
    return step.model_copy(update={"cache": answers}) if served and not anew else step


def _distils(chain: Pipeline) -> bool:
    return any(isinstance(step, KnowledgeDistillation) for step in chain.flatten())


def _common(one: Sequence[str], other: Sequence[str]) -> tuple[str, ...]:
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return tuple(step for step, _ in pairs)


def _index(texts: Mapping[str, Sequence[str]], steps: Sequence[str]) -> Iterator[int]:
    return (number for number, chain in enumerate(texts.values()) if tuple(chain[: len(steps)]) == tuple(steps))


def _short_names(steps: Sequence[Compressor]) -> list[str]:
    """Name steps by their keys; different ones of the same key are numbered: all they tell would be no folder's name.

    >>> import llmcompress as lc
    >>> _short_names([lc.MagnitudePruning(sparsity=0.5), lc.DynamicQuantization(), lc.MagnitudePruning(sparsity=0.9)])
    ['magnitude_pruning 1', 'dynamic_quantization', 'magnitude_pruning 2']
    """
    kinds: dict[str, list[Compressor]] = {}
    for step in steps:
        own = kinds.setdefault(str(step.to_dict()["name"]), [])
        if step not in own:
            own.append(step)
    return [
        key if len(kinds[key]) == 1 else f"{key} {1 + kinds[key].index(step)}"
        for key, step in ((str(step.to_dict()["name"]), step) for step in steps)
    ]
