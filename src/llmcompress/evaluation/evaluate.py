"""One model, measured in full: quality, size, speed, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from ..anatomy.footprint import footprint
from ..data import find_tokenizer, longest_input
from ..errors import CheckpointError, ConfigError, MissingInputError
from .latency import Latency, measure_latencies
from .machine import Machine, machine
from .memory import Memory, measure_memory
from .table import Table
from .tasks.task import Task, TaskScore
from .units import bytes_text, count_text, milliseconds_text, score_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Shape = tuple[int, int]
"""Rows and tokens of a batch."""

LATENCY_GRID: tuple[Shape, ...] = ((1, 128), (8, 128))
"""Where latency is measured if nothing else is asked for: a single text, and a batch."""


class Size(BaseModel, frozen=True, extra="forbid"):
    """How big the model is; tied weights counted once."""

    parameters: int = Field(description="weights, whatever their encoding")
    nonzero: int = Field(description="weights that are not zero")
    memory_bytes: int = Field(description="bytes of all tensors in memory")
    disk_bytes: int = Field(description="bytes of the safetensors files")
    from_files: bool = Field(description="whether disk_bytes was read off the folder, or predicted from the tensors")


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """Everything measured of one model. Prints as a table, also in a notebook."""

    model: str = Field(description="name of the model's class")
    scores: tuple[TaskScore, ...] = Field(description="one score a task")
    size: Size
    latency: tuple[Latency, ...] = Field(default=(), description="one entry a shape")
    memory: Memory | None = Field(default=None, description="peaks in a fresh process, if asked for")
    machine: Machine

    @property
    def score(self) -> TaskScore:
        """The first task's score."""
        return self.scores[0]

    @property
    def table(self) -> Table:
        """The table that `print` and notebooks show."""
        rows = []
        for score in self.scores:
            for name, value in score.metrics.items():
                interval = score.intervals.get(name)
                fraction = score.kinds[name].scale == "points"
                text = score_text(value, fraction=fraction)
                if interval:
                    text += f" [{', '.join(score_text(end, fraction=fraction) for end in interval)}]"
                rows.append((f"{name} ({score.task})" if len(self.scores) > 1 else name, text))
        rows.append(("size on disk", bytes_text(self.size.disk_bytes)))
        rows.append(("size in memory", bytes_text(self.size.memory_bytes)))
        rows.append(("parameters", count_text(self.size.parameters)))
        rows.append(("parameters, non-zero", count_text(self.size.nonzero)))
        for found in self.latency:
            spread = f"{milliseconds_text(found.median_ms)} (p90 {milliseconds_text(found.p90_ms)})"
            rows.append((f"latency {found.batch_size}x{found.tokens}", spread))
            rows.append(
                (f"throughput {found.batch_size}x{found.tokens}", f"{count_text(found.tokens_per_second)} tokens/s")
            )
        if self.memory:
            rows.append(("peak memory, load", bytes_text(self.memory.load_peak_bytes)))
            rows.append(("peak memory, inference", bytes_text(self.memory.inference_peak_bytes)))
        notes = [warning for score in self.scores for warning in score.warnings]
        return Table(("measured", "value"), rows, title=self.model, notes=[*notes, str(self.machine)])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts and lists."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return it as JSON, which `Evaluation.model_validate_json` reads back."""
        return self.model_dump_json(indent=1)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        return self.table.markdown()

    def __str__(self) -> str:
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table.html()


def evaluate(
    model: PreTrainedModel | str | Path,
    task: Task | Sequence[Task],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    batch_size: int = 32,
    latency: bool | Sequence[Shape] = True,
    memory: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Measure the quality, size and speed of a model.

    Args:
        model: a model, or a folder or hub name that is loaded with the head the first task needs. It is left as it was.
        task: one task, or several.
        tokenizer: the model's; if None the task's is taken, else the one in the model's folder.
        batch_size: examples a batch, at most.
        latency: whether to time the forward pass, or the (rows, tokens) shapes at which to.
        memory: whether to measure the peak memory in a fresh process (some seconds).
        progress: whether bars are shown.

    Raises:
        MissingInputError: no tokenizer was passed or found, or the data is empty.
        UnsupportedModelError: the model's head does not fit a task.
        ConfigError: a label or a setting is out of range.
        CompressionError: the model returns NaN.

    Example:
        >>> import llmcompress.testing as lt
        >>> from llmcompress.evaluation.tasks.text_classification import TextClassification
        >>> task = TextClassification([("good", 1), ("bad", 0)])
        >>> found = evaluate(lt.tiny_model("bert"), task, tokenizer=lt.tiny_tokenizer(), latency=False, progress=False)
        >>> found.score.primary
        'accuracy'
    """
    tasks = as_tasks(task)
    loaded = load_model(model, tasks[0])
    for one in tasks:
        one.check(loaded)
    shapes = latency_grid(latency, {"model": loaded})
    scores = score_tasks(loaded, tasks, tokenizer=tokenizer, batch_size=batch_size, progress=progress)
    latencies = []
    for rows, tokens in shapes:
        timed = measure_latencies({"model": loaded}, batch_size=rows, tokens=tokens, progress=progress)
        latencies.append(timed["model"])
    return Evaluation(
        model=type(loaded).__name__,
        scores=scores,
        size=measure_size(loaded, model),
        latency=tuple(latencies),
        memory=measure_memory(model if is_folder(model) else loaded) if memory else None,
        machine=machine(),
    )


def as_tasks(task: Task | Sequence[Task]) -> tuple[Task, ...]:
    """Return one task or several as a tuple.

    Raises:
        MissingInputError: there is none.
        ConfigError: something else than a task was passed.
    """
    found = (task,) if isinstance(task, Task) else tuple(task) if isinstance(task, Sequence) else (task,)
    if not found:
        raise MissingInputError("task is empty; pass at least one, for instance TextClassification(data).")
    for one in found:
        if not isinstance(one, Task):
            raise ConfigError(
                f"task must be a Task or a list of them, got {one!r:.80}; for instance TextClassification(data)."
            )
    return found


def load_model(source: PreTrainedModel | str | Path, task: Task) -> PreTrainedModel:
    """Return `source` if it is a model, else load it with the head that `task` needs.

    Raises:
        CheckpointError: transformers cannot load it.
        ConfigError: it is neither a model nor a name.
    """
    import transformers

    if isinstance(source, transformers.PreTrainedModel):
        return source
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"model must be a transformers model, a folder or a hub name, got {type(source).__name__}.")
    try:
        return getattr(transformers, task.auto_class).from_pretrained(source).eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{task.auto_class} cannot load {str(source)!r}: {error}") from error


def score_tasks(
    model: PreTrainedModel,
    tasks: Sequence[Task],
    *,
    tokenizer: PreTrainedTokenizerBase | None,
    batch_size: int,
    progress: bool,
) -> tuple[TaskScore, ...]:
    """Score `model` on each task; every tokenizer is found before the first task runs."""
    pairs = [(one, find_tokenizer(model, tokenizer or one.tokenizer, who=type(one).__name__)) for one in tasks]
    return tuple(one.evaluate(model, its_own, batch_size=batch_size, progress=progress) for one, its_own in pairs)


def measure_size(model: PreTrainedModel, source: object = None) -> Size:
    """Measure how big `model` is; `source` is the folder it was loaded from, if it was."""
    found = footprint(model)
    files = list(Path(source).glob("*.safetensors")) if isinstance(source, (str, Path)) else []
    return Size(
        parameters=found.parameters,
        nonzero=found.nonzero,
        memory_bytes=found.memory_bytes,
        disk_bytes=sum(file.stat().st_size for file in files) if files else found.disk_bytes,
        from_files=bool(files),
    )


def latency_grid(asked: bool | Sequence[Shape], models: Mapping[str, PreTrainedModel]) -> tuple[Shape, ...]:
    """Return the shapes to time; those of the default are cut to what the models can take.

    Raises:
        ConfigError: a shape is not a pair of positive integers, or longer than a model can take.
    """
    if asked is False:
        return ()
    limits = [limit for model in models.values() if (limit := longest_input(model)) is not None]
    if asked is True:
        return tuple(dict.fromkeys((rows, min([tokens, *limits])) for rows, tokens in LATENCY_GRID))
    shapes = tuple(tuple(shape) for shape in asked)
    for shape in shapes:
        if len(shape) != 2 or not all(isinstance(number, int) and number > 0 for number in shape):
            raise ConfigError(f"latency must be True, False, or (rows, tokens) pairs such as (1, 128), got {shape!r}.")
        if shape[1] > min(limits, default=shape[1]):
            raise ConfigError(f"latency must be at most {min(limits)} tokens for these models, got {shape!r}.")
    return tuple((shape[0], shape[1]) for shape in shapes)


def is_folder(source: object) -> bool:
    """Whether `source` names a local model folder."""
    return isinstance(source, (str, Path)) and (Path(source) / "config.json").is_file()
