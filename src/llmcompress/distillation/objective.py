"""The loss of one batch: soft, hard and feature parts, weighted; normalised by counts of the global batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .alignment import Alignment
from .answers import Answers
from .heads import IGNORED, LANGUAGE_MODELS, Batch, Head, counted, labelled, logits_of, targets, within_context
from .loss_choice import SoftLoss, reads_of
from .losses.labels import cross_entropy, squared_error
from .losses.maps import relation_heads
from .losses.table import FEATURE_LOSSES, FeatureLoss, Reads
from .observation import Observed
from .schedule import Scheduled, most, value_at


@dataclass(frozen=True)
class Objective:
    """`alpha` x soft + (1 - `alpha`) x hard + the `features`, each with its weight.

    Attributes:
        head: what the logits are; from `head_of`.
        soft: the loss against the teacher's logits; a regression has the squared error.
        temperature: of the soft loss.
        alpha: weight of the soft loss against the hard one, in [0, 1].
        features: weights of the losses on what is inside, by their names in `FEATURE_LOSSES`; each is averaged over the
            blocks that are compared.
        alignment: what of the teacher is compared.
    """

    head: Head
    soft: SoftLoss = field(default_factory=SoftLoss)
    temperature: Scheduled = 1.0
    alpha: Scheduled = 1.0
    features: Mapping[str, Scheduled] = field(default_factory=dict)
    alignment: Alignment = field(default_factory=Alignment)

    @property
    def asks_teacher(self) -> bool:
        """Whether any part needs the teacher's outputs; without it this is plain fine-tuning."""
        return most(self.alpha) > 0 or bool(self.reads)

    @property
    def reads(self) -> frozenset[Reads]:
        """What of the inside of both models is compared."""
        return reads_of(self.features)

    def for_teacher(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Return the student's inputs as the teacher reads them: the same tokens, by its own ids."""
        tokens = self.alignment.tokens
        if tokens is None:
            return dict(inputs)
        return {
            name: tokens.to(value.device)[value] if name.endswith("input_ids") else value
            for name, value in inputs.items()
        }

    def counts(self, batch: Batch) -> torch.Tensor:
        """Return how many answers, labels, input and decoder tokens of `batch` count: what the parts are divided by.

        The counts of the batches that make one optimizer step are added, over accumulation steps and processes.
        """
        masks = [counted(self.head, batch), labelled(self.head, batch)]
        tokens = self.token_masks(batch)
        return torch.stack([mask.sum() for mask in (*masks, tokens[0], tokens[-1])])

    def __call__(
        self,
        student: Observed,
        teacher: Observed | None,
        batch: Batch,
        counts: torch.Tensor,
        *,
        progress: float = 0.0,
    ) -> torch.Tensor:
        """Return the loss, a scalar: the sum of `parts`."""
        parts = self.parts(student, teacher, batch, counts, progress=progress)
        return torch.stack(list(parts.values())).sum()

    def parts(
        self,
        student: Observed,
        teacher: Observed | None,
        batch: Batch,
        counts: torch.Tensor,
        *,
        progress: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """Return the weighted losses by name: `soft`, `hard`, and those of `features`.

        Args:
            student: what the student put out.
            teacher: what the teacher put out; None where `asks_teacher` is false.
            batch: from `collate`.
            counts: from `counts`, added up over the global batch.
            progress: share of the training that is done, in [0, 1], for weights that follow a schedule.
        """
        ours = self._logits(student, batch)
        alpha = value_at(self.alpha, progress)
        parts = {}
        if alpha > 0 and teacher is not None:
            answers, heat = self.answers(teacher, batch), value_at(self.temperature, progress)
            mask, count = counted(self.head, batch), counts[0]
            if answers.answered is not None:
                answered = mask & answers.answered.to(mask.device)
                # The global batch was counted before the teacher read it. Its share without an answer is taken from
                # this batch: over one batch a mean over the answered positions, over several a mean of their means.
                count = (count * (answered.sum() / mask.sum().clamp(min=1)).to(count.device)).clamp(min=1)
                mask = answered
            parts["soft"] = alpha * self._soft(*answers.beside(ours, heat), mask, count, heat)
        if alpha < 1:
            labels = targets(self.head, batch)
            parts["hard"] = (1 - alpha) * self._hard(ours, labels, labelled(self.head, batch), counts[1])
        for name, scheduled in self.features.items():
            weight = value_at(scheduled, progress)
            if weight > 0 and teacher is not None:
                parts[name] = weight * self._feature(FEATURE_LOSSES[name], student, teacher, batch, counts)
        return parts

    def answers(self, teacher: Observed, batch: Batch) -> Answers:
        """Return what a teacher put out, laid beside the student's logits."""
        if teacher.answers is None:
            return Answers(self._logits(teacher, batch, self.alignment.tokens))
        if self.head == "question_answering":
            # What a cache holds, or a mean of several, has another number where the student's logits are masked.
            return replace(teacher.answers, logits=within_context(teacher.answers.logits, batch))
        return teacher.answers

    def _logits(self, observed: Observed, batch: Batch, tokens: torch.Tensor | None = None) -> torch.Tensor:
        logits = logits_of(self.head, observed.outputs, batch)
        if self.head not in LANGUAGE_MODELS:
            return logits
        return logits[..., : self.alignment.classes] if tokens is None else logits[..., tokens.to(logits.device)]

    def token_masks(self, batch: Batch) -> list[torch.Tensor]:
        """Return which tokens (rows, tokens) count, of each stack: all that are not padded."""
        inputs = batch["attention_mask"].bool()
        return [inputs, batch["labels"] != IGNORED] if self.head == "seq2seq_lm" else [inputs]

    def _soft(
        self, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, count: torch.Tensor, temperature: float
    ) -> torch.Tensor:
        if self.head == "regression":
            return squared_error(ours.squeeze(-1), theirs.squeeze(-1), mask=mask, count=count)
        return self.soft(ours, theirs, temperature=temperature, mask=mask, count=count)

    def _hard(self, ours: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if self.head == "regression":
            return squared_error(ours.squeeze(-1), labels, mask=mask, count=count)
        return cross_entropy(ours, labels, mask=mask, count=count)

    def _feature(
        self, loss: FeatureLoss, student: Observed, teacher: Observed, batch: Batch, counts: torch.Tensor
    ) -> torch.Tensor:
        aligned, errors = self.alignment, []
        for stack, (mask, count, pairs) in enumerate(
            zip(self.token_masks(batch), counts[2:], aligned.pairs, strict=False)
        ):
            on: dict[str, Any] = {"mask": mask, "count": count}
            if loss.reads == "embeddings":
                errors.append(loss.function(student.states[stack][0], aligned.state(teacher.states[stack][0]), **on))
                continue
            for mine, theirs in pairs:
                if loss.reads == "states":
                    states = student.states[stack][mine + 1], aligned.state(teacher.states[stack][theirs + 1])
                    errors.append(loss.function(*states, **on))
                elif loss.reads == "attention":
                    maps = aligned.attention(teacher.attention[stack][theirs], stack, theirs)
                    errors.append(loss.function(student.attention[stack][mine], maps, **on))
                else:
                    vectors = zip(student.relations[stack, mine], teacher.relations[stack, theirs], strict=True)
                    # Queries, keys and values count one each, as in MiniLMv2.
                    errors.append(sum(loss.function(a, b, heads=_heads(a, b), **on) for a, b in vectors))
        return torch.stack(errors).mean()


def _heads(student: torch.Tensor, teacher: torch.Tensor) -> int:
    return relation_heads(student.shape[-1], teacher.shape[-1])
