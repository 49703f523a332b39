"""Masking for masked language models, drawn anew each time a row comes up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.vocabulary import vocabulary_size
from ..errors import MissingInputError
from .heads import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Masking:
    """Hide some tokens of a batch, as BERT does (arXiv 1810.04805): of those chosen 80 % become the mask token, 10 %
    any token, 10 % stay. Teacher and student are asked about the same ones; at least one of each row.

    Attributes:
        mask_token: what hides a token.
        vocabulary: how many tokens there are.
        share: of the tokens that are not special, which are chosen; in (0, 1].

    Example:
        >>> ids = torch.arange(5, 15)[None]
        >>> batch = {"input_ids": ids, "counted": torch.ones_like(ids), "labels": ids.clone()}
        >>> hidden = Masking(mask_token=1, vocabulary=20, share=0.5)(batch, torch.Generator().manual_seed(0))
        >>> bool((hidden["labels"][hidden["counted"] == 1] == ids[hidden["counted"] == 1]).all())
        True
        >>> bool((hidden["input_ids"] == ids)[hidden["counted"] == 0].all())
        True
    """

    mask_token: int
    vocabulary: int
    share: float = 0.15

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the batch with tokens hidden; `counted` and `labels` tell which.

        Args:
            batch: from `collate` of a masked language model; `counted` is what may be chosen.
            generator: draws what is chosen, on the CPU.
        """
        place = batch["input_ids"].device
        ids, maskable = batch["input_ids"].cpu(), batch["counted"].bool().cpu()
        draw = torch.rand(ids.shape, generator=generator).masked_fill(~maskable, 2.0)
        chosen = maskable & ((draw < self.share) | (draw == draw.min(-1, keepdim=True).values))
        way = torch.rand(ids.shape, generator=generator)
        others = torch.randint(self.vocabulary, ids.shape, generator=generator)
        hidden = torch.where(way < 0.8, self.mask_token, torch.where(way < 0.9, others, ids))
        return {
            **batch,
            "input_ids": torch.where(chosen, hidden, ids).to(place),
            "labels": batch["labels"].masked_fill(~chosen.to(place), IGNORED),
            "counted": chosen.long().to(place),
        }


def masking_for(model: PreTrainedModel, tokenizer: Any) -> Masking:
    """Return how tokens are hidden from `model`.

    Raises:
        MissingInputError: the tokenizer has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise MissingInputError(
            f"KnowledgeDistillation needs a tokenizer with a mask token for {type(model).__name__}, got "
            f"{type(tokenizer).__name__} without one; pass the tokenizer that the model was trained with."
        )
    return Masking(tokenizer.mask_token_id, vocabulary_size(model))
