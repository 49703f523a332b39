"""How far a model's answers move when one part of it is cut, left out or rounded: KL to the base on a few texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.answers import answers_of, divergence, log_distributions
from ..calibration.replay import Batch, Forward, replaced
from ..data import Example, encode
from ..pruning.bypass import bypassed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Sensitivities:
    """The answers of the base, and how far those of changed models are from them, in nats an answer.

    A part of a changed model is judged alone by lending its blocks to the base, or the base's to it.

    Args:
        model: the base; it is left as it was.
        batches: token ids that it runs on.
        blocks: the paths of its blocks.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], blocks: Sequence[str]) -> None:
        self._model, self._batches, self._blocks = model, batches, blocks
        self._base = [self._answers(model, batch) for batch in batches]

    def without(self, gone: Sequence[int]) -> float:
        """Return what leaving out these blocks does."""
        with bypassed(self._model, [self._blocks[number] for number in gone]):
            return self._distance(self._model)

    def with_blocks(self, other: PreTrainedModel) -> list[float]:
        """Return for each block what it does to have that one from `other`, a model of the same depth.

        Where a block of `other` cannot stand among those of the base, all of them are judged together, in equal parts:
        T5's first block hands the others a position bias of one row a head, and heads may be fewer.
        """
        try:
            return [self._with_block(other, number) for number in range(len(self._blocks))]
        except (RuntimeError, ValueError, LookupError):  # shapes that do not fit; torch tells them in either way
            return [self._distance(other) / len(self._blocks)] * len(self._blocks)

    def rest_of(self, other: PreTrainedModel) -> float:
        """Return what is done by all of `other` that is in no block."""
        with replaced(other, self._lent(self._model, range(len(self._blocks)))):
            return self._distance(other)

    def _with_block(self, other: PreTrainedModel, number: int) -> float:
        with replaced(self._model, self._lent(other, [number])):
            return self._distance(self._model)

    def _lent(self, lender: PreTrainedModel, numbers: Sequence[int]) -> Mapping[str, Any]:
        paths = [self._blocks[number] for number in numbers]
        # Bound to the lender's own forward now: where lender and borrower are one, it would call itself.
        return {path: partial(_instead, lender.get_submodule(path).forward) for path in paths}

    def _distance(self, model: PreTrainedModel) -> float:
        found = [
            divergence(base, self._answers(model, batch)) for base, batch in zip(self._base, self._batches, strict=True)
        ]
        return _mean(found)

    def _answers(self, model: PreTrainedModel, batch: Batch) -> torch.Tensor:
        return log_distributions(answers_of(model, Forward(model, all_logits=True)(batch)))


def answers_to(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[Example], *, max_length: int
) -> list[torch.Tensor]:
    """Return the log probabilities of a model's answers to each text alone, of shape (answers, classes)."""
    forward = Forward(model, all_logits=True)
    rows = [_row(model, tokenizer, text, max_length) for text in texts]
    return [log_distributions(answers_of(model, forward(row))) for row in rows]


def vocabulary_damage(base: Sequence[torch.Tensor], cut: Sequence[torch.Tensor]) -> float | None:
    """Return what a cut vocabulary does to the answers to texts that it was not cut for, in nats an answer.

    None where the answers cannot be laid beside each other: one a token, of texts that fall into other tokens.

    Args:
        base: the base's `answers_to` some texts, at least one.
        cut: those of the model with the cut vocabulary.

    Example:
        >>> sure = torch.tensor([[0.75, 0.25]]).log()
        >>> round(vocabulary_damage([sure], [sure.flip(1)]), 3), vocabulary_damage([sure], [sure.repeat(2, 1)])
        (0.549, None)
    """
    if any(one.shape != other.shape for one, other in zip(base, cut, strict=True)):
        return None
    return _mean([divergence(*both) for both in zip(base, cut, strict=True)])


def _mean(found: Sequence[torch.Tensor]) -> float:
    mean = float(torch.cat(list(found)).double().mean())
    # What cannot be computed is as bad as can be.
    return mean if mean == mean else float("inf")


def _row(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Example, max_length: int
) -> dict[str, torch.Tensor]:
    row = encode([text], tokenizer, max_length=max_length)[0]
    taken = {key: value for key, value in row.items() if key in ("input_ids", "attention_mask", "token_type_ids")}
    return {key: torch.tensor([value], device=model.device) for key, value in taken.items()}


def _instead(lent: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return lent(*args, **kwargs)

    return forward
