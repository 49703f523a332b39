"""One model, measured in full: quality, size, speed, memory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from ..anatomy.module_sizes import quantized_by
from ..data import find_tokenizer
from ..errors import CheckpointError, ConfigError, MissingInputError
from .cost import Cost, Shape, measure_costs, plan_costs
from .flops import Flops
from .generation_latency import GenerationLatency
from .latency import Latency
from .machine import Machine, machine
from .memory import Memory
from .scoring import score_models
from .size import Size
from .table import Table
from .tasks.task import Task, TaskScore
from .units import bytes_text, count_text, json_numbers, milliseconds_text, score_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Evaluation(BaseModel, frozen=True, extra="forbid"):
    """Everything measured of one model. Prints as a table, also in a notebook."""

    model: str = Field(description="name of the model's class")
    scores: tuple[TaskScore, ...] = Field(description="one score a task")
    size: Size
    flops: Flops | None = Field(default=None, description="of one forward pass at the first shape of `latency`")
    latency: tuple[Latency, ...] = Field(default=(), description="one entry a shape")
    generation: tuple[GenerationLatency, ...] = Field(default=(), description="one entry a (prompt, new) pair")
    quantization: str | None = Field(
        default=None, description="the method that its weights are quantized by, if they are"
    )
    memory: Memory | None = Field(default=None, description="peaks in a fresh process, if asked for")
    machine: Machine

    @classmethod
    def of(cls, model: PreTrainedModel, scores: Sequence[TaskScore], cost: Cost) -> Evaluation:
        """Put together what was measured of `model`."""
        return cls(
            model=type(model).__name__,
            scores=tuple(scores),
            size=cost.size,
            flops=cost.flops,
            latency=cost.latency,
            generation=cost.generation,
            quantization=quantized_by(model),
            memory=cost.memory,
            machine=machine(),
        )

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
        rows += _cost_rows(self)
        notes = [warning for score in self.scores for warning in score.warnings]
        return Table(("measured", "value"), rows, title=self.model, notes=[*notes, str(self.machine)])

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain dicts and lists."""
        return self.model_dump(mode="json")

    def to_json(self) -> str:
        """Return it as JSON, which `Evaluation.model_validate_json` reads back."""
        return json.dumps(json_numbers(self.to_dict()), indent=1, ensure_ascii=False, allow_nan=False)

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
    generation: bool | Sequence[Shape] | None = None,
    memory: bool = False,
    threads: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure the quality, size and speed of a model.

    Args:
        model: a model, or a folder or hub name that is loaded with the head the first task needs. It is left as it was.
        task: one task, or several.
        tokenizer: the model's; if None the task's is taken, else the one in the model's folder.
        batch_size: examples a batch, at most.
        latency: whether to time the forward pass, or the (rows, tokens) shapes at which to.
        generation: whether to time generation, or the (prompt, new) tokens at which to; None does so where latency is
            measured and the model generates.
        memory: whether to measure the peak memory in a fresh process (some seconds).
        threads: intra-op threads of torch while the model is timed; None leaves them.
        progress: whether bars are shown.

    Raises:
        MissingInputError: no tokenizer was passed or found, or the data is empty.
        CheckpointError: the folder cannot be loaded, or has no weights for the head that the first task needs.
        UnsupportedModelError: the model's head does not fit a task, or it cannot generate.
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
        find_tokenizer(loaded, tokenizer or one.tokenizer, who=type(one).__name__)
    models = {"model": loaded}
    plan = plan_costs(models, latency=latency, generation=generation, memory=memory, threads=threads)
    tokenizers = {"model": tokenizer}
    scored = [score_models(one, models, tokenizers, batch_size=batch_size, progress=progress) for one in tasks]
    costs = measure_costs(models, {"model": model}, plan, progress=progress)
    return Evaluation.of(loaded, [found.scores["model"] for found in scored], costs["model"])


def as_tasks(task: Task | Sequence[Task]) -> tuple[Task, ...]:
    """Return one task or several as a tuple.

    Raises:
        MissingInputError: there is none.
        ConfigError: something else than a task was passed.
    """
    # A text is a sequence too, of its letters.
    found: tuple[Any, ...] = tuple(task) if isinstance(task, Sequence) and not isinstance(task, str) else (task,)
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

    A part without saved weights would be random, and be scored as if it were the model: it is refused, but for the
    pooler of a bare encoder (`AutoModel`), which few checkpoints hold and no head needs.

    Raises:
        CheckpointError: transformers cannot load it, or it has no weights for a part of the model.
        ConfigError: it is neither a model nor a name.
    """
    import transformers

    if isinstance(source, transformers.PreTrainedModel):
        return source
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"model must be a transformers model, a folder or a hub name, got {type(source).__name__}.")
    head = task.auto_class
    try:
        # Texts are written by both kinds, which no one class of transformers loads.
        if head == "AutoModelForCausalLM" and transformers.AutoConfig.from_pretrained(source).is_encoder_decoder:
            head = "AutoModelForSeq2SeqLM"
        model, info = getattr(transformers, head).from_pretrained(source, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{head} cannot load {str(source)!r}: {error}") from error
    missing = [name for name in sorted(info["missing_keys"]) if head != "AutoModel" or "pooler." not in name]
    if missing:
        raise CheckpointError(
            f"{str(source)!r} was saved as {', '.join(model.config.architectures or ['a model of no class'])} and has "
            f"no weights for {', '.join(missing[:4])}, which {type(model).__name__} needs; pass a model that was "
            f"fine-tuned with this head, or choose a task that the saved head fits."
        )
    return model.eval()


def _cost_rows(found: Evaluation) -> list[tuple[str, str]]:
    size, memory = found.size, found.memory
    rows = [
        ("size on disk", bytes_text(size.disk_bytes)),
        ("size in memory", bytes_text(size.memory_bytes)),
        ("parameters", count_text(size.parameters)),
        ("parameters, non-zero", count_text(size.nonzero)),
    ]
    if size.sparse_bytes is not None:
        rows.append(("size without zeros (theoretical, not realised)", bytes_text(size.sparse_bytes)))
    if found.flops:
        counted = count_text(found.flops.count) if found.flops.count is not None else found.flops.reason
        rows.append((f"operations {found.flops.batch_size}x{found.flops.tokens}", counted))
    for one in found.latency:
        at = f"{one.batch_size}x{one.tokens}"
        rows.append((f"latency {at}", f"{milliseconds_text(one.median_ms)} (p90 {milliseconds_text(one.p90_ms)})"))
        rows.append((f"throughput {at}", f"{count_text(one.tokens_per_second)} tokens/s"))
        if one.energy:
            rows.append((f"energy {at}", f"{one.energy.joules:.3g} J a pass ({', '.join(one.energy.counters)})"))
    for told in found.generation:
        at = f"{told.batch_size}x({told.prompt_tokens}+{told.new_tokens})"
        first, token = milliseconds_text(told.first_token_ms), milliseconds_text(told.token_ms)
        rows.append((f"first token {at}", f"{first} (p90 {milliseconds_text(told.first_token_p90_ms)})"))
        rows.append((f"further token {at}", f"{token} (p90 {milliseconds_text(told.token_p90_ms)})"))
        rows.append((f"generation {at}", f"{count_text(told.tokens_per_second)} tokens/s"))
    if memory:
        rows.append(("peak memory, load", bytes_text(memory.load_peak_bytes)))
        rows.append(("peak memory, inference", bytes_text(memory.inference_peak_bytes)))
        if memory.cuda_peak_bytes is not None:
            rows.append(("peak memory, CUDA", bytes_text(memory.cuda_peak_bytes)))
    return rows
