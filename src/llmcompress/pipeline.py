"""Chains of steps, and the runner: checks first, then one copy, then each step measured and recorded."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field, SerializeAsAny, field_validator

from .anatomy.footprint import footprint
from .checkpoint import load
from .compressor import Action, Compressor, Context, Need
from .distillation.distillation import KnowledgeDistillation
from .errors import ConfigError, PipelineOrderError
from .gates import Gate, OnFail, read_gates
from .inputs import check_inputs, check_model, check_seed, check_task, refuse_unready
from .measured import check_chain
from .recipe import read_recipe, write_recipe
from .recovery import read_recovery, unrecovered, with_recovery
from .registry import compressors, register
from .result import Report, Result, library_versions
from .resume import Stages
from .run import Judging, Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .evaluation.tasks import Task

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
            PipelineOrderError: a step follows a terminal one, or stands before one that takes the model's place.
        """
        flat: list[Compressor] = []
        places: list[int] = []
        for place, step in enumerate(self.steps):
            flat.extend(step.flatten() if isinstance(step, Pipeline) else [step])
            places.extend([place] * (len(flat) - len(places)))
        for (earlier, later), place in zip(itertools.pairwise(flat), places[1:], strict=True):
            if earlier.terminal:
                raise PipelineOrderError(
                    f"{type(later).__name__} cannot follow {type(earlier).__name__}, whose weights are no longer "
                    f"float; put {type(earlier).__name__} last.",
                    location=("steps", place),
                )
            if later.begins:
                raise PipelineOrderError(
                    f"{type(later).__name__} takes another model in place of the one it is given, so what "
                    f"{type(earlier).__name__} does is lost; put {type(later).__name__} first: got {later}.",
                    location=("steps", place),
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
        """Return what else is said of a step, by this pipeline or by the nested one that it is of."""
        own = [] if self.recover is None else unrecovered(step)
        nested = (one for one in self.steps if isinstance(one, Pipeline) and step in one.flatten())
        return own or next((one._remarks(step) for one in nested), [])

    @classmethod
    def from_dict(cls, recipe: Mapping[str, Any]) -> Pipeline:
        """Build a pipeline from what `to_dict` returned, or from any single step's dict."""
        step = compressors.create(recipe)
        return step if isinstance(step, Pipeline) else cls(steps=(step,))

    def to_yaml(self, path: str | Path, *, description: str | None = None) -> None:
        """Write the recipe to a YAML file, every field included.

        Args:
            path: of the file.
            description: what the recipe is for; reading passes over it.
        """
        write_recipe(self.to_dict(), path, description=description)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Pipeline:
        """Read a recipe from a YAML file.

        Raises:
            CompressionError: a branch of it, naming file, line and key: the file is absent, is no YAML, has an unknown
                or wrong key, or steps that cannot follow one another.
        """
        step = read_recipe(path)
        return step if isinstance(step, Pipeline) else cls(steps=(step,))

    def __str__(self) -> str:
        return " -> ".join(str(step) for step in self.steps) or "Pipeline()"


def compress(
    model: PreTrainedModel | str | Path,
    steps: Step | Sequence[Step],
    *,
    data: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    task: Task | None = None,
    gates: Gate | Mapping[str, Any] | Sequence[Gate | Mapping[str, Any]] = (),
    on_fail: OnFail = "rollback",
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
        gates: what each stage may lose against the base on `task`: `MaxDrop`, `MaxPerplexityRatio`, `MinAgreement`, or
            their dicts. All are asked after each step.
        on_fail: what is done with a stage that fails one. `"rollback"` returns the stage before it; the steps behind
            are not run. (Without `resume_dir` a copy of that stage is kept in memory meanwhile.) `"stop"` raises,
            `"warn"` goes on. The report tells in each case.
        recover: a `KnowledgeDistillation` that is run behind every step that changes weights; see `Pipeline`.
        seed: seeds every step; the caller's random state is not touched.
        inplace: compress `model` itself, without a copy; then there is no teacher, and no roll-back.
        resume_dir: folder where each finished stage is kept, and of a long one each epoch or block. A rerun with the
            same model, data, tokenizer, seed and library versions goes on there; a changed chain reuses its unchanged
            beginning. Many chains may share a folder, side by side in several processes; `remove_stages` tidies it.
        progress: show progress bars.

    Returns:
        The result: `.model`, `.report`, `.save_pretrained(folder)`.

    Raises:
        CompressionError: one of its branches, before any work: wrong order, missing data, nothing to compress, a step
            that cannot take what an earlier one leaves (where sizes tell), a model that is already quantized, a gate
            that the task cannot tell about.
        BusyError: another process is at work on the same stage of `resume_dir`.
        GateError: a stage failed a gate, with `on_fail="stop"`; it has the report so far.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> result = lc.compress(tiny_model("bert"), lc.MagnitudePruning(sparsity=0.5), progress=False)
        >>> round(result.report.steps[0].footprint.zeros, 2) > 0.25
        True
    """
    check_model(model, "compress.model")
    check_seed(seed, "compress.seed")
    if task is not None:
        check_task(task, "compress.task")
    if isinstance(model, (str, Path)):
        model = load(model)
    chain = Pipeline(steps=steps, recover=recover)
    flat = chain.flatten()
    if not flat:
        raise ConfigError("compress() must have at least one step, got none; pass steps=[lc.DynamicQuantization()].")
    refuse_unready(model)
    if resume_dir is not None and inplace:
        raise ConfigError("compress() must have resume_dir or inplace=True, not both: a resumed stage is a new model.")
    asked = read_gates(gates, on_fail, task, inplace=inplace)
    examples, tokenizer = check_inputs(model, flat, data, tokenizer, task, inplace)
    context = Context(
        data=examples,
        tokenizer=tokenizer,
        teacher=None if inplace else model,
        seed=seed,
        device=model.device,
        progress=progress,
    )
    plan = check_chain(flat, model, context)
    if task is not None:
        task.check(model)

    report = Report(
        model=type(model).__name__,
        recipe=chain.to_dict(),
        seed=seed,
        versions=library_versions(),
        base=footprint(model),
        gates=[gate.to_dict() for gate in asked],
        on_fail=on_fail if asked else None,
    )
    stages = Stages(resume_dir, model, examples, seed, tokenizer) if resume_dir is not None else None
    training = model.training
    run = Run(model, flat, plan, chain._remarks, context, Judging(task, asked, on_fail), stages, report)
    # Whatever the caller's mode is: training and gradients of importances need a graph.
    with torch.inference_mode(False), torch.enable_grad():
        compressed = run.go()
    compressed.train(training)
    return Result(model=compressed, report=report, tokenizer=context.tokenizer)
