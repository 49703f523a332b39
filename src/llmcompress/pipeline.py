"""Chains of steps, and the runner: checks first, then one copy, then each step measured and recorded."""

from __future__ import annotations

import copy
import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml
from pydantic import Field, SerializeAsAny, field_validator
from tqdm.auto import tqdm

from .anatomy.footprint import Footprint, footprint
from .anatomy.kept import random_state_kept
from .anatomy.probe import probe_inputs, probe_outputs
from .checkpoint import load
from .compressor import Action, Compressor, Context, Need
from .data import longest_input
from .distillation.distillation import KnowledgeDistillation
from .errors import (
    ConfigError,
    NothingToCompressError,
    PipelineOrderError,
    UnsupportedModelError,
    VerificationError,
)
from .evaluation.latency import Speedup, measure_latencies, speedup
from .inputs import check_inputs, refuse_quantized
from .quantization.hf import mark
from .recovery import read_recovery, unrecovered, with_recovery
from .registry import compressors, register
from .result import TOLD_ZEROS, Report, Result, StepRecord, library_versions
from .resume import Stages

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation.tasks import Task

# Tokens of the row on which a finished chain is timed against its base.
_SPEED_TOKENS = 64

Step = Compressor | Mapping[str, Any] | str


@register("pipeline")
class Pipeline(Compressor):
    """Steps run one after the other; itself a step, so pipelines nest.

    Args:
        steps: compressors, their dicts (`{"name": "magnitude_pruning", "sparsity": 0.5}`), or their names.
        recover: a `KnowledgeDistillation` that is run behind every step that changes weights, so that each gives back
            what it lost; zeros stay zero. Before a quantization that it can be trained for (`quantize_for`), it is;
            behind one there are no weights to train. Beside a distillation of the chain none is added.

    Example:
        >>> import llmcompress as lc
        >>> chain = lc.Pipeline(steps=[lc.MagnitudePruning(sparsity=0.5), "dynamic_quantization"])
        >>> [type(step).__name__ for step in chain.flatten()]
        ['MagnitudePruning', 'DynamicQuantization']
        >>> lc.Pipeline.from_dict(chain.to_dict()) == chain
        True
    """

    steps: tuple[SerializeAsAny[Compressor], ...] = Field((), description="the steps, first to last")
    recover: KnowledgeDistillation | None = Field(None, description="distillation behind each step, or None")

    @field_validator("steps", mode="before")
    @classmethod
    def _create(cls, steps: Any) -> Any:
        if isinstance(steps, (Compressor, Mapping, str)):
            steps = [steps]
        if not isinstance(steps, Sequence):
            raise ConfigError(f"Pipeline.steps must be a list of compressors, got {steps!r}.")
        return tuple(step if isinstance(step, Compressor) else compressors.create(step) for step in steps)

    @field_validator("recover", mode="before")
    @classmethod
    def _read_recovery(cls, recover: Any) -> KnowledgeDistillation | None:
        return read_recovery(recover)

    @property
    def needs(self) -> frozenset[Need]:
        """Everything that any step needs."""
        return frozenset().union(*(step.needs for step in self.flatten()))

    @property
    def terminal(self) -> bool:
        """Whether a step of the chain is terminal."""
        return any(step.terminal for step in self.steps)

    def flatten(self) -> list[Compressor]:
        """Return the steps with nested pipelines unrolled, and with the recoveries.

        Raises:
            PipelineOrderError: a step follows a terminal one.
        """
        flat: list[Compressor] = []
        for step in self.steps:
            flat.extend(step.flatten() if isinstance(step, Pipeline) else [step])
        for earlier, later in itertools.pairwise(flat):
            if earlier.terminal:
                raise PipelineOrderError(
                    f"{type(later).__name__} cannot follow {type(earlier).__name__}, whose weights are no longer "
                    f"float; put {type(earlier).__name__} last."
                )
        return flat if self.recover is None else list(with_recovery(flat, self.recover))

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Concatenate the plans of the steps, each made on the model as it arrives."""
        return [action for step in self.flatten() for action in (*step.plan(model, context), *self._remarks(step))]

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Run the steps in order, unrecorded; `lc.compress` is the way that checks, measures and records."""
        for step in self.flatten():
            model = step.compress(model, context)
        return model

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as a plain dict."""
        recovery = {} if self.recover is None else {"recover": self.recover.to_dict()}
        return {"name": compressors.name_of(type(self)), "steps": [step.to_dict() for step in self.steps], **recovery}

    def _remarks(self, step: Compressor) -> list[Action]:
        return [] if self.recover is None else unrecovered(step)

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> Pipeline:
        """Build a pipeline from what `to_dict` returned, or from any single step's dict."""
        step = compressors.create(recipe)
        return step if isinstance(step, Pipeline) else cls(steps=(step,))

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe to a YAML file."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False), encoding="utf-8")

    @classmethod
    def from_yaml(cls, path: str | Path) -> Pipeline:
        """Read a recipe from a YAML file.

        Raises:
            ConfigError: the file is absent, is no YAML, or has an unknown or wrong key.
        """
        try:
            recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"there is no recipe {str(path)!r}.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is no valid YAML: {error}") from error
        return cls.from_dict(recipe)

    def __str__(self) -> str:
        return " -> ".join(str(step) for step in self.steps) or "Pipeline()"


def compress(
    model: PreTrainedModel | str | Path,
    steps: Step | Sequence[Step],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: Task | None = None,
    recover: Step | None = None,
    seed: int = 0,
    inplace: bool = False,
    resume_dir: str | Path | None = None,
    progress: bool = True,
) -> Result:
    """Run `steps` over a copy of `model`, measure each, and return the compressed model with its report.

    Args:
        model: a Hugging Face model, or a folder or hub name to load one from. It is never changed, and is the teacher
            of distillation.
        steps: one step or several: compressors, their names, or their dicts.
        data: training or calibration examples; anything that `load_examples` takes.
        tokenizer: for the texts of `data` and `task`; found in the model's folder if it came from one.
        task: evaluated before the first and after each step, if given.
        recover: a `KnowledgeDistillation` that is run behind every step that changes weights; see `Pipeline`.
        seed: seeds every step; the caller's random state is not touched.
        inplace: compress `model` itself, without a copy; then there is no teacher.
        resume_dir: folder where each finished stage is kept; a rerun with the same model, data, steps and seed
            continues behind the last one.
        progress: show progress bars.

    Returns:
        The result: `.model`, `.report`, `.save_pretrained(folder)`.

    Raises:
        CompressionError: one of its branches, before any work: wrong order, missing data, nothing to compress, a model
            that is already quantized.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> result = lc.compress(tiny_model("bert"), lc.MagnitudePruning(sparsity=0.5), progress=False)
        >>> round(result.report.steps[0].footprint.zeros, 2) > 0.25
        True
    """
    if isinstance(model, (str, Path)):
        model = load(model)
    chain = Pipeline(steps=steps, recover=recover)
    flat = chain.flatten()
    if not flat:
        raise ConfigError("compress() must have at least one step, got none; pass steps=[lc.DynamicQuantization()].")
    refuse_quantized(model)
    if resume_dir is not None and inplace:
        raise ConfigError("compress() must have resume_dir or inplace=True, not both: a resumed stage is a new model.")
    examples, tokenizer = check_inputs(model, flat, data, tokenizer, task, inplace)
    context = Context(
        data=examples,
        tokenizer=tokenizer,
        teacher=None if inplace else model,
        seed=seed,
        device=model.device,
        progress=progress,
    )
    plans = [_plan(step, model, context) for step in flat]
    if task is not None:
        task.check(model)

    training = model.training
    report = Report(
        model=type(model).__name__,
        recipe=chain.to_dict(),
        seed=seed,
        versions=library_versions(),
        base=footprint(model),
        base_score=_score(task, model, tokenizer, progress),
    )
    stages = Stages(resume_dir, model, examples, seed) if resume_dir is not None else None
    current = model if inplace else copy.deepcopy(model)
    finite = _is_finite(current)
    bar = tqdm(flat, desc="compress", unit="step", disable=not progress or len(flat) < 2, leave=False)
    for index, step in enumerate(bar):
        bar.set_description(type(step).__name__)
        if stages is not None and (stage := stages.find(step)) is not None:
            current, record, cuts, found = stage
            context.history.extend(cuts)
            if found is not None:
                context.replace_tokenizer(found)
            report.steps.append(record)
            continue
        cuts_before, tokenizer_before = len(context.history), context.tokenizer
        # What stands before a later step is another model than was planned on before all work.
        actions = plans[0] if index == 0 else _plan(step, current, context)
        actions = [*actions, *chain._remarks(step)]
        context.work_in(stages.work_dir if stages is not None else None)
        current, record = _run(step, current, actions, context, task)
        if finite and not _is_finite(current):
            raise VerificationError(
                f"{type(step).__name__} left {type(current).__name__} with NaN or infinite outputs; the result is "
                f"withheld. Compress less, or leave layers out with skip=(...)."
            )
        last = report.steps[-1].footprint if report.steps else report.base
        if not inplace and _differs(last, record.footprint):
            record.speedup = _speedup(model, current)
        report.steps.append(record)
        if stages is not None:
            replaced = context.tokenizer if context.tokenizer is not tokenizer_before else None
            stages.keep(current, record, context.history[cuts_before:], replaced)
    if not inplace:
        report.speedup = report.steps[-1].speedup or _speedup(model, current)
    current.train(training)
    return Result(model=current, report=report, tokenizer=context.tokenizer)


def _run(
    step: Compressor, model: PreTrainedModel, actions: list[Action], context: Context, task: Task | None
) -> tuple[PreTrainedModel, StepRecord]:
    context.told.clear()
    context.corrected.clear()
    model.eval()
    shapes = _shapes(model)
    start = time.perf_counter()
    with _seeded(context.seed):
        model = step.compress(model, context)
    seconds = time.perf_counter() - start
    model.eval()
    if _shapes(model) != shapes:
        _mark(model, context)
    found = context.findings(actions)
    record = StepRecord(
        step=step.to_dict(),
        seconds=seconds,
        footprint=footprint(model),
        touched=[action for action in found if action.touched],
        left=[action for action in found if not action.touched],
        score=_score(task, model, context.tokenizer, context.progress),
    )
    return model, record


def _shapes(model: PreTrainedModel) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())}


def _mark(model: PreTrainedModel, context: Context) -> None:
    """Have the config tell what shapes the model has now, so that whatever saves it writes a folder that loads."""
    try:
        mark(model)
    except UnsupportedModelError as error:
        context.tell(Action(path="", reason=f"a folder of this model will not load by from_pretrained: {error}"))


def _plan(step: Compressor, model: PreTrainedModel, context: Context) -> list[Action]:
    actions = step.plan(model, context)
    if not any(action.touched for action in actions):
        reasons = sorted({action.reason or "" for action in actions})
        raise NothingToCompressError(
            f"{type(step).__name__} finds nothing to compress in {type(model).__name__}: "
            f"{'; '.join(reasons) or 'its plan is empty'}."
        )
    return actions


def _score(task: Task | None, model: PreTrainedModel, tokenizer: Any, progress: bool) -> Any:
    if task is None:
        return None
    from .evaluation.evaluate import evaluate

    return evaluate(model, task, tokenizer=tokenizer, latency=False, progress=progress).scores[0]


def _differs(before: Footprint, after: Footprint) -> bool:
    """Tell whether a step changed more than values: then its speed is worth a measurement."""
    sizes = (before.parameters, before.disk_bytes) != (after.parameters, after.disk_bytes)
    return sizes or abs(before.zeros - after.zeros) > TOLD_ZEROS


def _speedup(base: PreTrainedModel, candidate: PreTrainedModel) -> Speedup | None:
    """Time base and candidate in turns, on one row of tokens or one image; None for what reads something else."""
    tokens = min(_SPEED_TOKENS, longest_input(base) or _SPEED_TOKENS)
    try:
        # Zero seconds ask for the fewest rounds that still give an interval.
        timed = measure_latencies({"base": base, "candidate": candidate}, tokens=tokens, seconds=0, progress=False)
    except UnsupportedModelError:
        return None
    found = speedup(timed["base"], timed["candidate"])
    return found.model_copy(update={"tokens": 0}) if base.main_input_name == "pixel_values" else found


def _is_finite(model: PreTrainedModel) -> bool:
    try:
        outputs = probe_outputs(model, probe_inputs(model))
    except UnsupportedModelError:
        return False  # neither text nor images: there is no probe, and the strategies' own checks stand alone
    return bool(torch.isfinite(outputs).all())


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed Python, numpy and torch inside, and give the caller's random state back."""
    with random_state_kept():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        yield
