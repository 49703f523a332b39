"""How a teacher with a tokenizer of its own reads a batch that was made for the student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..data import Example, encode
from .answers import Answers
from .batches import padded
from .heads import IGNORED, Batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class OwnTexts:
    """For answers a text: the teacher reads the texts of the rows as its tokenizer cuts them.

    Args:
        examples: one a row, by the row's number.
        tokenizer: the teacher's.
        max_length: tokens that it can take at most.
        pad: the token by which it knows padding.

    Attributes:
        rows: the tokens of each text.
    """

    def __init__(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, pad: int
    ) -> None:
        self.rows = encode(examples, tokenizer, max_length=max_length)
        self._pad = pad

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the teacher's inputs for the rows of a batch."""
        rows = [self.rows[row] for row in batch["row"].tolist()]
        fills = {name: self._pad if name == "input_ids" else 0 for name in rows[0]}
        return {name: padded([row[name] for row in rows], fill) for name, fill in fills.items()}

    def lay(self, logits: torch.Tensor, batch: Batch) -> Answers:
        """Return the answers as they are: one a text."""
        return Answers(logits)


@dataclass(frozen=True)
class OwnTokens:
    """For answers a token: the teacher reads the text that the student's tokens stand for.

    Its i-th answer in the continuation lies beside the student's i-th (arXiv 2402.12030); where one of both has fewer
    tokens, the rest has no answer.

    Attributes:
        student: the student's tokenizer.
        teacher: the teacher's.
        max_length: tokens that the teacher can take at most.
        pad: the token by which the teacher knows padding.
    """

    student: PreTrainedTokenizerBase
    teacher: PreTrainedTokenizerBase
    max_length: int
    pad: int

    def __call__(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Return the teacher's inputs for the rows of a batch."""
        rows = [ids for ids, _ in self._read(batch)]
        return {
            "input_ids": padded(rows, self.pad),
            "attention_mask": padded([[1] * len(ids) for ids in rows], 0),
        }

    def lay(self, logits: torch.Tensor, batch: Batch) -> Answers:
        """Return the teacher's logits (rows, its tokens - 1, classes) in the positions of the student's."""
        positions = torch.arange(batch["labels"].shape[1] - 1)
        places, answered = [], []
        for (ids, begins), (_, starts) in zip(self._read(batch), self._parts(batch), strict=True):
            place = positions + begins - starts
            answered.append((place >= max(begins - 1, 0)) & (place < len(ids) - 1))
            places.append(place.clamp(0, logits.shape[1] - 1))
        place = torch.stack(places).to(logits.device)
        laid = logits.gather(1, place[..., None].expand(-1, -1, logits.shape[-1]))
        return Answers(laid, answered=torch.stack(answered).to(logits.device))

    def _parts(self, batch: Batch) -> list[tuple[list[int], int]]:
        """Return the tokens of each row, and where the continuation begins that is learned."""
        parts = []
        for ids, inside, labels in zip(*(batch[name].tolist() for name in _NAMES), strict=True):
            row = [token for token, there in zip(ids, inside, strict=True) if there]
            first = next((place for place, label in enumerate(labels) if label != IGNORED), len(row))
            if first == 0 and row and row[0] == self.student.bos_token_id:
                first = 1
            parts.append((row, first))
        return parts

    def _read(self, batch: Batch) -> list[tuple[list[int], int]]:
        """Return each row in the teacher's tokens, and where the continuation begins in it."""
        read = []
        for row, first in self._parts(batch):
            prompt = self._tokens(self._text(row[:first]), special=True)
            if prompt and prompt[-1] == self.teacher.eos_token_id:
                prompt = prompt[:-1]
            answer = self._tokens(self._text(row[first:]), special=False)
            ended = bool(row) and row[-1] == self.student.eos_token_id and self.teacher.eos_token_id is not None
            ids = prompt + answer + ([self.teacher.eos_token_id] if ended else [])
            read.append((ids[: self.max_length] or [self.teacher.eos_token_id or 0], len(prompt)))
        return read

    def _text(self, ids: Sequence[int]) -> str:
        text: Any = self.student.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _tokens(self, text: str, *, special: bool) -> list[int]:
        return list(self.teacher(text, add_special_tokens=special, verbose=False)["input_ids"])


_NAMES = ("input_ids", "attention_mask", "labels")
