"""Texts that a model wrote, to train on: the teacher's once for all, or the student's own as it learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from tqdm.auto import tqdm

from ..anatomy.kept import modes_kept
from ..compressor import Settings
from .batches import Row, collate
from .heads import IGNORED, Batch, Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Generation(Settings):
    """Training on texts that a language model writes from the beginnings of those given.

    `"sequence"`: the teacher writes once, before the training, and the student learns its texts by the hard loss and
    what it thinks of them by the soft one (sequence-level distillation, arXiv 1606.07947). `"on_policy"`: the student
    writes as it learns, and the teacher judges every token (GKD, arXiv 2306.13649); no label is learned there.

    A prompt is the first text of a pair, else the first `prompt_tokens` tokens of a text. Texts are read one by one,
    and not joined.

    Args:
        way: `"sequence"` or `"on_policy"`.
        share: of the rows (`"sequence"`) or batches (`"on_policy"`) that are written so, in (0, 1].
        max_new_tokens: tokens written at most, as far as `max_length` and the writer's positions allow.
        prompt_tokens: tokens of a text without a second one that are the prompt.
        temperature: of what is drawn; 0 takes the likeliest token each time.

    Example:
        >>> Generation(way="on_policy", share=0)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: Generation.share must be in (0, 1], got 0.
    """

    way: Literal["sequence", "on_policy"] = Field("sequence", description="who writes, and when")
    share: float = Field(0.5, gt=0, le=1, description="of the rows or batches that are written")
    max_new_tokens: int = Field(64, gt=0, description="tokens written at most")
    prompt_tokens: int = Field(16, gt=0, description="tokens of a text that are its prompt")
    temperature: float = Field(1.0, ge=0, description="of what is drawn; 0 takes the likeliest")


class Writer:
    """Writes rows anew: keeps each one's prompt, and has a model continue it.

    Args:
        model: writes; it is put into eval mode meanwhile.
        head: `"causal_lm"` or `"seq2seq_lm"`.
        settings: how much, and how freely.
        max_length: tokens of a row, no more than the model can take.
        pad: token that pads.
        tokens: the model's id of each of the rows' tokens where the two differ, else None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head,
        settings: Generation,
        *,
        max_length: int,
        pad: int,
        tokens: torch.Tensor | None = None,
    ) -> None:
        self._model, self._head, self._settings = model, head, settings
        self._max_length, self._pad, self._tokens = max_length, pad, tokens
        ends = model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or ())
        self._numbers = {} if tokens is None else {theirs: ours for ours, theirs in enumerate(tokens.tolist())}

    def write(self, rows: Sequence[Row], seed: int) -> list[Row]:
        """Return the rows with what the model wrote as their labels; those that leave it no room stay as they are."""
        most = self._settings.max_new_tokens
        if self._head == "seq2seq_lm":
            # The decoder has as many positions as the encoder.
            answers = self._continue([row["input_ids"] for row in rows], min(most, self._max_length), seed)
            return [{**row, "labels": answer or row["labels"]} for row, answer in zip(rows, answers, strict=True)]
        prompts = [self._open(prompt_of(row, self._settings.prompt_tokens)) for row in rows]
        rooms = [min(most, self._max_length - len(prompt)) for prompt in prompts]
        result = list(rows)
        # All at once but for those near the end of their room: whoever writes on beside them runs out of positions.
        for room in sorted({room for room in rooms if room > 0}):
            some = [index for index, own in enumerate(rooms) if own == room]
            answers = self._continue([prompts[index] for index in some], room, seed)
            for index, answer in zip(some, answers, strict=True):
                if answer:
                    result[index] = _continued(rows[index], prompts[index], answer)
        return result

    @torch.no_grad()
    def _continue(self, prompts: list[list[int]], most: int, seed: int) -> list[list[int]]:
        longest, place = max(map(len, prompts)), self._model.device
        # What goes on to the right is padded on the left; an encoder does not mind.
        ids = torch.tensor([[self._pad] * (longest - len(prompt)) + self._theirs(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        draws = self._settings.temperature > 0
        how: dict[str, Any] = {"temperature": self._settings.temperature, "top_k": 0, "top_p": 1.0} if draws else {}
        with modes_kept(self._model), torch.random.fork_rng():
            torch.manual_seed(seed)
            self._model.eval()
            written = self._model.generate(
                input_ids=ids.to(place),
                attention_mask=mask.to(place),
                max_new_tokens=most,
                do_sample=draws,
                pad_token_id=self._pad,
                use_cache=True,
                **how,
            )
        start = 1 if self._head == "seq2seq_lm" else longest
        return [self._ours(answer) for answer in written[:, start:].tolist()]

    def _open(self, prompt: list[int]) -> list[int]:
        """Return the prompt without the end of a text that is no longer than it."""
        ended = len(prompt) > 1 and self._theirs(prompt[-1:])[0] in self._ends
        return prompt[:-1] if ended else prompt

    def _theirs(self, ids: list[int]) -> list[int]:
        return ids if self._tokens is None else self._tokens[torch.tensor(ids)].tolist()

    def _ours(self, ids: list[int]) -> list[int]:
        """Return what was written up to its end, in the ids of the rows."""
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids) - 1)
        answer = ids[: end + 1]
        if self._tokens is None:
            return answer
        known = next((place for place, token in enumerate(answer) if token not in self._numbers), len(answer))
        return [self._numbers[token] for token in answer[:known]]


def _continued(row: Row, prompt: list[int], answer: list[int]) -> Row:
    whole = prompt + answer
    labels = [IGNORED] * len(prompt) + answer
    return {**row, "input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}


def prompt_of(row: Row, tokens: int) -> list[int]:
    """Return what of a row is its prompt: what comes before its labels, else its first `tokens` tokens.

    Example:
        >>> prompt_of({"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}, 1)
        [5, 6]
        >>> prompt_of({"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, 1)
        [5]
    """
    given = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), 0)
    return list(row["input_ids"][: given or tokens])


def teacher_written(
    rows: Sequence[Row], writer: Writer, *, share: float, batch_size: int, seed: int, progress: bool
) -> list[Row]:
    """Return `rows` with a `share` of them, drawn at random, as `writer` wrote them."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[
        : max(round(share * len(rows)), 1)
    ]
    # Prompts of like length pad each other little.
    order = sorted(chosen.tolist(), key=lambda index: len(rows[index]["input_ids"]))
    result = list(rows)
    for at in tqdm(range(0, len(order), batch_size), desc="teacher writes", disable=not progress, leave=False):
        some = order[at : at + batch_size]
        for index, row in zip(some, writer.write([rows[index] for index in some], seed + at), strict=True):
            result[index] = row
    return result


class OnPolicy:
    """Replaces a share of the batches by what the student writes at that moment; there no label counts.

    Args:
        writer: of the student.
        head: of the student.
        share: of the batches.
        pad: token that pads.
        decoder_start: first token of an encoder-decoder's decoder.
    """

    def __init__(self, writer: Writer, head: Head, *, share: float, pad: int, decoder_start: int | None) -> None:
        self._writer, self._head, self._share = writer, head, share
        self._pad, self._decoder_start = pad, decoder_start

    def __call__(self, batch: Batch, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Return the batch, or what the student makes of its prompts; `generator` decides."""
        if float(torch.rand((), generator=generator)) >= self._share:
            return dict(batch)
        seed = int(torch.randint(2**31, (), generator=generator))
        place = batch["input_ids"].device
        written = collate(
            self._head, self._writer.write(_rows_of(batch), seed), pad=self._pad, decoder_start=self._decoder_start
        )
        written["unlabelled"] = torch.ones(len(written["input_ids"]), dtype=torch.bool)
        return {name: value.to(place) for name, value in written.items()}


def _rows_of(batch: Batch) -> list[Row]:
    rows: list[Row] = []
    for index, mask in enumerate(batch["attention_mask"].bool()):
        row: Row = {
            name: batch[name][index][mask].tolist()
            for name in ("input_ids", "attention_mask", "token_type_ids")
            if name in batch
        }
        labels = batch["labels"][index]
        same = labels.shape == mask.shape and "decoder_input_ids" not in batch
        row["labels"] = labels[mask].tolist() if same else labels[labels != IGNORED].tolist()
        rows.append({**row, "row": int(batch["row"][index])})
    return rows
