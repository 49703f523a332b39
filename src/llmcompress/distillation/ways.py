"""What a student learns from beside the data as it is: texts that models wrote, and altered copies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ..compressor import Action, Context
from ..data import Example
from ..errors import ConfigError, UnsupportedModelError
from .alignment import Alignment
from .arguments import Training
from .augmentation import Augmentation
from .batches import Row, row_length
from .checkpoints import remembered
from .early_stopping import check_held_out
from .generation import Generation, OnPolicy, Writer, teacher_written
from .heads import Head
from .sources import load_source
from .teachers import is_original
from .teaching import PlannedTeacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRITERS: tuple[Head, ...] = ("causal_lm", "seq2seq_lm")
_READERS: tuple[Head, ...] = ("classification", "multi_label", "regression", "question_answering")


def check_ways(head: Head, model: PreTrainedModel, generation: Generation | None, augment: Augmentation | None) -> None:
    """Refuse ways of learning that the head does not allow. Reads no weights.

    Raises:
        UnsupportedModelError: `model` writes no texts, or its answers hang on each single word.
        ConfigError, MissingInputError: as `MaskedWords.check`.
    """
    who = type(model).__name__
    if generation is not None and head not in _WRITERS:
        raise UnsupportedModelError(
            f"KnowledgeDistillation.generation must be None for {who}, which writes no texts; it is for causal and "
            f"encoder-decoder language models."
        )
    if augment is not None:
        if head not in _READERS:
            raise UnsupportedModelError(
                f"KnowledgeDistillation.augment must be None for {who}, whose answers are the words themselves; it is "
                f"for classifiers and readers of questions."
            )
        augment.check()


def check_writer(generation: Generation | None, teachers: Sequence[PlannedTeacher]) -> None:
    """Refuse teachers that cannot write what the student reads.

    Raises:
        ConfigError: there are several teachers, or one with another tokenizer, and they write before the training.
    """
    if generation is None or generation.way != "sequence":
        return
    if len(teachers) != 1 or teachers[0].tokenizer is not None:
        got = f"{len(teachers)} of them" if len(teachers) != 1 else f"{teachers[0].name} with another tokenizer"
        raise ConfigError(
            f"KnowledgeDistillation.generation must have one teacher with the student's tokenizer to write, got {got}; "
            f"use way='on_policy', or name another teacher."
        )


def way_actions(generation: Generation | None, augment: Augmentation | None) -> list[Action]:
    """Return what a plan says of them."""
    told = []
    if generation is not None:
        what = (
            "rows, written by the teacher before" if generation.way == "sequence" else "batches, by the student itself"
        )
        told.append(Action(path="", does=f"train on written texts: {generation.share:.0%} of the {what}"))
    if augment is not None:
        told.append(Action(path="", does=augment.does, reason="without labels; the teacher tells what they are"))
    return told


def altered_copies(
    examples: Sequence[Example], augment: Augmentation, context: Context, device: torch.device
) -> list[Example]:
    """Return the copies that `augment` makes of the examples; made once, also if the run is killed."""
    file = context.work_dir / "copies.json" if context.work_dir is not None else None

    def make() -> list[tuple[str, str | None]]:
        made = augment.copies_of(examples, device=device, seed=context.seed, progress=context.progress)
        return [(example.text, example.pair) for example in made]

    return [Example(text, pair) for text, pair in remembered(file, make)]


@dataclass(frozen=True)
class Ways:
    """Who writes what a student learns from.

    Attributes:
        generation: the settings, or None where nobody writes.
        head: of both models.
        max_length: tokens of a row.
        training: gives seed, padding and batch size.
    """

    generation: Generation | None
    head: Head
    max_length: int
    training: Training

    def teacher_rows(
        self,
        rows: list[Row],
        teachers: Sequence[PlannedTeacher],
        alignments: Sequence[Alignment],
        original: PreTrainedModel | None,
    ) -> list[Row]:
        """Return the rows, a share of them as the teacher wrote them; written once, also if the run is killed.

        Args:
            rows: from `make_rows`.
            teachers: of which the one there is writes.
            alignments: tell its id of each of the rows' tokens, where the two differ.
            original: the untouched model.

        Raises:
            ConfigError: of the rows none can be held out.
        """
        settings, training = self.generation, self.training
        if training.early_stopping is not None and training.early_stopping.task is None:
            check_held_out(rows)  # `train` does too, but behind the teacher's whole pass
        if settings is None or settings.way != "sequence":
            return rows
        source = teachers[0].source

        def make() -> list[Row]:
            model = original if is_original(source) else load_source(source, "KnowledgeDistillation.teacher")
            assert model is not None
            return teacher_written(
                rows,
                self._writer(model, settings, alignments[0].tokens),
                share=settings.share,
                batch_size=training.batch_size,
                seed=training.seed,
                progress=training.progress,
            )

        return remembered(None if training.folder is None else training.folder / "written.json", make)

    def on_policy(self, student: PreTrainedModel) -> OnPolicy | None:
        """Return what replaces batches by what `student` writes, or None."""
        settings, training = self.generation, self.training
        if settings is None or settings.way != "on_policy":
            return None
        writer = self._writer(student, settings)
        return OnPolicy(writer, self.head, share=settings.share, pad=training.pad, decoder_start=training.decoder_start)

    def _writer(self, model: PreTrainedModel, settings: Generation, tokens: torch.Tensor | None = None) -> Writer:
        # What is written must be read again, so it gets no longer than the rows of the texts.
        length = row_length(model, self.training.tokenizer, self.max_length)
        return Writer(model, self.head, settings, max_length=length, pad=self.training.pad, tokens=tokens)
