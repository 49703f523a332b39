"""Tasks whose examples go through the model batch by batch, several models side by side if need be."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from tqdm.auto import tqdm

from ...anatomy.pooling import classifies_last_token
from ..inference import evaluating
from .task import Task, TaskScore, check_positive

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Observer = Callable[[str, "Batch", Any], None]
"""Is shown a model's name, its batch and its outputs, right after each forward pass."""


@dataclass(frozen=True)
class Batch:
    """What goes through a model at once.

    Attributes:
        rows: which pieces of the task's work it holds: examples, windows, options.
        inputs: what the model is called with, each of shape (rows, tokens), on the CPU.
        scored: of shape (rows, tokens): where the logits answer for something; None where a row has one answer.
    """

    rows: tuple[int, ...]
    inputs: dict[str, torch.Tensor]
    scored: torch.Tensor | None = None

    def same_inputs(self, other: Batch) -> bool:
        """Whether another model is called with the very same."""
        return self.inputs.keys() == other.inputs.keys() and all(
            torch.equal(value, other.inputs[key]) for key, value in self.inputs.items()
        )


class Run(ABC):
    """One model on its way through a task: batches out, outputs in, a score at the end.

    Attributes:
        model: the model.
        batches: all its batches, the slowest first.
        options: what else the model is called with.
    """

    options: ClassVar[Mapping[str, Any]] = {}

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model = model
        self.batches = batches

    @abstractmethod
    def read(self, batch: Batch, outputs: Any) -> None:
        """Keep what the score needs of the model's outputs for `batch`.

        Raises:
            CompressionError: they are not finite.
            UnsupportedModelError: they do not have the shape the task needs.
        """

    @abstractmethod
    def score(self) -> TaskScore:
        """Return the score, once every batch was read."""

    def answers(self, batch: Batch, outputs: Any) -> torch.Tensor | None:
        """Return the logits that answer for something, of shape (answers, classes), or None where there are none.

        Fidelity to a base compares their distributions.
        """
        logits: torch.Tensor = outputs.logits
        return logits if batch.scored is None else logits[batch.scored.to(logits.device)]


@dataclass(frozen=True, eq=False, kw_only=True)
class ForwardTask(Task):
    """A task done by plain forward passes; a subclass implements `check` and `start`."""

    unit: ClassVar[str] = "ex"
    """What the progress bar counts."""

    @abstractmethod
    def start(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int) -> Run:
        """Check the model, tokenise the data for it, and cut it into batches.

        Raises:
            CompressionError: one of its branches: a head that does not fit, a label out of range, a foreign tokenizer.
        """

    def evaluate(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, batch_size: int = 32, progress: bool = True
    ) -> TaskScore:
        """Score `model`; see `Task.evaluate`."""
        check_positive("batch_size", batch_size, optional=False)
        run = self.start(model, tokenizer, batch_size=batch_size)
        advance({"model": run}, title=self.name, unit=self.unit, progress=progress)
        return run.score()


def advance(
    runs: Mapping[str, Run], *, title: str, unit: str = "ex", progress: bool = True, observer: Observer | None = None
) -> None:
    """Take all models through their batches, side by side, so that no outputs need to be kept to compare them.

    Args:
        runs: by name, the base first.
        title: of the progress bar.
        unit: what the bar counts.
        progress: whether it is shown.
        observer: sees each output before it is forgotten; for every batch the models come in order.
    """
    longest = max((len(run.batches) for run in runs.values()), default=0)
    total = sum(len(batch.rows) for run in runs.values() for batch in run.batches)
    bar = tqdm(total=total, desc=title, unit=unit, disable=not progress, leave=False)
    with ExitStack() as stack:
        stack.enter_context(bar)
        for run in runs.values():
            stack.enter_context(evaluating(run.model))
        for number in range(longest):
            for name, run in runs.items():
                if number >= len(run.batches):
                    continue
                batch = run.batches[number]
                inputs = {key: value.to(run.model.device) for key, value in batch.inputs.items()}
                outputs = run.model(**inputs, **run.options)
                run.read(batch, outputs)
                if observer is not None:
                    observer(name, batch, outputs)
                bar.update(len(batch.rows))


def by_length(lengths: Sequence[int], size: int, *, most_tokens: int | None = None) -> Iterator[tuple[int, ...]]:
    """Batch examples of like length, so that little is padded; the longest first.

    What does not fit in memory so fails at once, and the time left is never underrated.

    Args:
        lengths: tokens of each example.
        size: examples a batch, at most.
        most_tokens: tokens a batch, padding included; a longer example is a batch of its own. None sets no limit.

    Example:
        >>> list(by_length([3, 9, 5], 2))
        [(1, 2), (0,)]
        >>> list(by_length([3, 9, 5, 2], 2, most_tokens=10))
        [(1,), (2, 0), (3,)]
    """
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        rows = size if most_tokens is None else max(1, min(size, most_tokens // longest))
        yield tuple(order[start : start + rows])
        start += rows


def pad_rows(rows: Iterable[Mapping[str, Sequence[int]]], pad: int, side: str = "right") -> dict[str, torch.Tensor]:
    """Pad tokenised examples to the longest, and stack them to tensors of shape (rows, tokens).

    Args:
        rows: `input_ids` and what else the tokenizer gave, a mapping an example.
        pad: token that fills `input_ids`; the rest is filled with 0.
        side: `"left"` or `"right"`.

    Example:
        >>> pad_rows([{"input_ids": [5, 6], "attention_mask": [1, 1]}, {"input_ids": [7], "attention_mask": [1]}], 0)
        {'input_ids': tensor([[5, 6],
                [7, 0]]), 'attention_mask': tensor([[1, 1],
                [1, 0]])}
    """
    rows = list(rows)
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, values: Sequence[int]) -> list[int]:
        padding = [pad if key == "input_ids" else 0] * (longest - len(values))
        return [*padding, *values] if side == "left" else [*values, *padding]

    keys = [key for key in ("input_ids", "attention_mask", "token_type_ids") if key in rows[0]]
    return {key: torch.tensor([padded(key, row[key]) for row in rows]) for key in keys}


def padding_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, bool]:
    """Return the padding token, and whether examples must go through the model one at a time.

    The model's own padding token comes first: RoBERTa counts positions by it, and the classifiers on top of decoders
    find the last token of a row by it; one of those that names none refuses batches. Where nobody names one, any token
    serves, since padding is masked.
    """
    own = model.config.get_text_config().pad_token_id
    if own is not None:
        return own, False
    fallbacks = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in fallbacks if token is not None), classifies_last_token(model)
