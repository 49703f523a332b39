"""The loss of one batch: soft, hard and hidden-state parts, weighted; normalised by counts of the global batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .heads import IGNORED, LANGUAGE_MODELS, Batch, Head, counted, labelled, logits_of, targets
from .losses import cross_entropy, forward_kl, hidden_state_error, squared_error


@dataclass(frozen=True)
class Objective:
    """`alpha` x soft + (1 - `alpha`) x hard + `hidden` x hidden states.

    Attributes:
        head: what the logits are; from `head_of`.
        temperature: of the soft loss.
        alpha: weight of the soft loss against the hard one, in [0, 1].
        hidden: weight of the hidden states' error, averaged over the layers that are compared.
        layers: for each stack, which teacher hidden state each student block should put out; from `layer_map`.
        classes: compare only the first so many classes: the tokens that are real where vocabularies are padded to
            different sizes. None compares all.
        tokens: the teacher's id of each of the student's tokens, where an earlier step cut the student's vocabulary;
            None where both have the same.
        features: the teacher's number of each of the student's hidden features, where an earlier step cut the residual
            stream; None where both have the same.
    """

    head: Head
    temperature: float = 1.0
    alpha: float = 1.0
    hidden: float = 0.0
    layers: Sequence[tuple[int, ...]] = field(default_factory=tuple)
    classes: int | None = None
    tokens: torch.Tensor | None = None
    features: torch.Tensor | None = None

    @property
    def asks_teacher(self) -> bool:
        """Whether any part needs the teacher's outputs; without it this is plain fine-tuning."""
        return self.alpha > 0 or self.hidden > 0

    def for_teacher(self, inputs: Batch) -> dict[str, torch.Tensor]:
        """Return the student's inputs as the teacher reads them: the same tokens, by its own ids."""
        if self.tokens is None:
            return dict(inputs)
        return {
            name: self.tokens.to(value.device)[value] if name.endswith("input_ids") else value
            for name, value in inputs.items()
        }

    def counts(self, batch: Batch) -> torch.Tensor:
        """Return how many answers, labels, input and decoder tokens of `batch` count: what the parts are divided by.

        The counts of the batches that make one optimizer step are added, over accumulation steps and processes.
        """
        masks = [counted(self.head, batch), labelled(self.head, batch)]
        tokens = self._token_masks(batch)
        return torch.stack([mask.sum() for mask in (*masks, tokens[0], tokens[-1])])

    def __call__(self, student: Any, teacher: Any, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        """Return the loss, a scalar.

        Args:
            student: the student's outputs: `.logits`, and with `hidden` its hidden states.
            teacher: the teacher's; None where `asks_teacher` is false.
            batch: from `collate`.
            counts: from `counts`, added up over the global batch.
        """
        ours = self._logits(student, batch)
        loss = ours.new_zeros((), dtype=torch.float32)
        if self.alpha > 0:
            theirs = self._logits(teacher, batch, self.tokens)
            loss = loss + self.alpha * self._soft(ours, theirs, counted(self.head, batch), counts[0])
        if self.alpha < 1:
            labels = targets(self.head, batch)
            loss = loss + (1 - self.alpha) * self._hard(ours, labels, labelled(self.head, batch), counts[1])
        if self.hidden > 0:
            loss = loss + self.hidden * self._hidden(student, teacher, batch, counts)
        return loss

    def _logits(self, outputs: Any, batch: Batch, tokens: torch.Tensor | None = None) -> torch.Tensor:
        logits = logits_of(self.head, outputs, batch)
        if self.head not in LANGUAGE_MODELS:
            return logits
        return logits[..., : self.classes] if tokens is None else logits[..., tokens.to(logits.device)]

    def _token_masks(self, batch: Batch) -> list[torch.Tensor]:
        inputs = batch["attention_mask"].bool()
        return [inputs, batch["labels"] != IGNORED] if self.head == "seq2seq_lm" else [inputs]

    def _soft(self, ours: torch.Tensor, theirs: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if self.head == "regression":
            return squared_error(ours.squeeze(-1), theirs.squeeze(-1), mask=mask, count=count)
        return forward_kl(ours, theirs, temperature=self.temperature, mask=mask, count=count)

    def _hard(self, ours: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        if self.head == "regression":
            return squared_error(ours.squeeze(-1), labels, mask=mask, count=count)
        return cross_entropy(ours, labels, mask=mask, count=count)

    def _hidden(self, student: Any, teacher: Any, batch: Batch, counts: torch.Tensor) -> torch.Tensor:
        names = ["encoder_hidden_states", "decoder_hidden_states"] if self.head == "seq2seq_lm" else ["hidden_states"]
        errors = []
        for name, mask, count, layers in zip(names, self._token_masks(batch), counts[2:], self.layers, strict=False):
            ours, theirs = getattr(student, name)[1:], getattr(teacher, name)
            errors += [
                hidden_state_error(state, self._features(theirs[layer]), mask=mask, count=count)
                for state, layer in zip(ours, layers, strict=True)
            ]
        return torch.stack(errors).mean()

    def _features(self, state: torch.Tensor) -> torch.Tensor:
        """Return those of a teacher's hidden features that the student has, too."""
        return state if self.features is None else state[..., self.features.to(state.device)]
