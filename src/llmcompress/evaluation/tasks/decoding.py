"""Prompts in, texts out: batches that a model continues without drawing at random."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from ...data import longest_input
from ...errors import ConfigError
from ..inference import evaluating
from .forward import by_length, pad_rows, padding_of
from .repetition import loops
from .task import check_vocabulary, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What a generation config always says, or what no greedy decoding reads.
_UNTOLD = {"transformers_version", "use_cache", "output_attentions", "output_hidden_states", "do_sample", "max_length"}
_UNTOLD |= {"temperature", "top_k", "top_p", "num_beams", "max_new_tokens", "_from_model_config", "typical_p", "min_p"}


@dataclass(frozen=True)
class Decoding:
    """How texts are generated.

    Attributes:
        max_new_tokens: the longest text, in tokens.
        max_prompt_tokens: the longest prompt; None takes what the model can.
        num_beams: beams; 1 is greedy.
        stop: a text ends before the first of these strings.
    """

    max_new_tokens: int
    max_prompt_tokens: int | None = None
    num_beams: int = 1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Written:
    """What a model wrote after one prompt.

    Attributes:
        text: without special tokens, and without white space around it.
        tokens: how many it was generated from, end of text excluded.
        complete: whether the model ended it, by itself or at a stop string.
        loops: whether it ends in one piece that is repeated.
    """

    text: str
    tokens: int
    complete: bool
    loops: bool


class Writer:
    """A model that continues prompts by `Decoding`.

    Args:
        who: the task's name, for messages.
        model: a decoder or an encoder-decoder.
        tokenizer: its tokenizer.
        decoding: how.
        prompts: what to continue.

    Raises:
        ConfigError: a prompt has no token, the model has no room for prompt and text, or the tokenizer is another's.

    Example:
        >>> import llmcompress.testing as lt
        >>> writer = Writer("Demo", lt.tiny_model("gpt2"), lt.tiny_tokenizer(), Decoding(5), ["once", "upon a time"])
        >>> [text.tokens for text in writer.write(batch_size=2, progress=False)]
        [5, 5]
    """

    def __init__(
        self,
        who: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        decoding: Decoding,
        prompts: Sequence[str],
    ) -> None:
        self._model, self._tokenizer, self._decoding = model, tokenizer, decoding
        self._pad, _ = padding_of(model, tokenizer)
        ends = model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if ends is None else ends
        self._ends: list[int] = ends if isinstance(ends, list) else [] if ends is None else [ends]
        self._limit = self._prompt_limit(who)
        whole = [list(ids) for ids in tokenizer(list(prompts), padding=False, verbose=False)["input_ids"]]
        empty = next((index for index, ids in enumerate(whole) if not ids), None)
        if empty is not None:
            raise ConfigError(f"{who}.data[{empty}] must have a prompt of a token at least, got {prompts[empty]!r}.")
        check_vocabulary(whole, model, tokenizer)
        self._prompts = [self._cut(ids, prompt) for ids, prompt in zip(whole, prompts, strict=True)]
        self.cut_prompts = sum(len(ids) < len(full) for ids, full in zip(self._prompts, whole, strict=True))

    @property
    def protocol(self) -> dict[str, str | int | float | bool | None]:
        """What another person needs to know to get the same texts."""
        own = self._model.generation_config.to_diff_dict()
        told = {key: value for key, value in own.items() if key not in _UNTOLD and not key.endswith("_token_id")}
        beams = self._decoding.num_beams
        return {
            "decoding": "greedy" if beams == 1 else f"beam search, {beams} beams",
            "generation_config": json.dumps(told, sort_keys=True, default=str),
            "max_new_tokens": self._decoding.max_new_tokens,
            "end_of_text": ", ".join(f"token {end}" for end in self._ends) or "none",
            "stop": json.dumps(self._decoding.stop, ensure_ascii=False),
            "max_prompt_tokens": self._limit,
            "prompts_cut": self.cut_prompts,
            "padding": f"{self._side}, token {self._pad}, prompts sorted by length",
        }

    def write(self, *, batch_size: int, progress: bool, title: str = "") -> list[Written]:
        """Continue every prompt; the texts are in the order of the prompts.

        Raises:
            CompressionError: the model's logits are NaN; the message names the prompt.
        """
        written: list[Written | None] = [None] * len(self._prompts)
        with (
            evaluating(self._model),
            tqdm(total=len(written), desc=title, unit="text", disable=not progress, leave=False) as bar,
        ):
            for rows in by_length([len(ids) for ids in self._prompts], batch_size):
                for row, text in zip(rows, self._continued(rows), strict=True):
                    written[row] = text
                bar.update(len(rows))
        return [text for text in written if text is not None]

    @property
    def _side(self) -> str:
        # A decoder goes on from the last column: padding must be before the text.
        return "right" if self._model.config.is_encoder_decoder else "left"

    def _continued(self, rows: Sequence[int]) -> list[Written]:
        prompts = [{"input_ids": self._prompts[i], "attention_mask": [1] * len(self._prompts[i])} for i in rows]
        device = self._model.device
        inputs = {key: value.to(device) for key, value in pad_rows(prompts, self._pad, self._side).items()}
        start = 1 if self._model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        watch = _NanWatch()
        tokens: torch.Tensor = self._model.generate(
            **inputs,
            max_new_tokens=self._decoding.max_new_tokens,
            num_beams=self._decoding.num_beams,
            do_sample=False,
            # Read by sampling only; a generation config that sets them would make transformers warn at every batch.
            temperature=1.0,
            top_p=1.0,
            top_k=50,
            pad_token_id=self._pad,
            eos_token_id=self._ends or None,
            logits_processor=[watch],
            stopping_criteria=[_Stopped(self._tokenizer, self._decoding.stop, start)] if self._decoding.stop else None,
        )
        if bad := watch.rows(len(rows)):
            raise not_finite(self._model, f"the text after prompt {min(rows[i] for i in bad)} of the data")
        return [self._read(ids) for ids in tokens[:, start:].tolist()]

    def _read(self, ids: list[int]) -> Written:
        end = next((at for at, token in enumerate(ids) if token in self._ends), None)
        kept, complete = ids[:end], end is not None
        stops = self._decoding.stop
        if stops and _stop_in(self._decoded(kept), stops) is not None:
            complete = True
            length = bisect_left(
                range(len(kept)), True, key=lambda length: _stop_in(self._decoded(kept[:length]), stops) is not None
            )
            kept = kept[:length]
        text = self._decoded(kept)
        return Written(text[: _stop_in(text, stops)].strip(), len(kept), complete, loops(kept))

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _prompt_limit(self, who: str) -> int | None:
        most = longest_input(self._model, self._tokenizer)
        if most is not None and not self._model.config.is_encoder_decoder:
            most -= self._decoding.max_new_tokens
            if most < 1:
                raise ConfigError(
                    f"{who}.max_new_tokens must leave room for a prompt in the {most + self._decoding.max_new_tokens} "
                    f"tokens of {type(self._model).__name__}, got {self._decoding.max_new_tokens}."
                )
        asked = self._decoding.max_prompt_tokens
        if asked is not None and most is not None and asked > most:
            raise ConfigError(
                f"{who}.max_prompt_tokens must be at most {most} for {type(self._model).__name__} and "
                f"max_new_tokens={self._decoding.max_new_tokens}, got {asked}."
            )
        return asked or most

    def _cut(self, ids: list[int], prompt: str) -> list[int]:
        if self._limit is None or len(ids) <= self._limit:
            return ids
        if self._model.config.is_encoder_decoder:
            return list(self._tokenizer(prompt, truncation=True, max_length=self._limit)["input_ids"])
        # A decoder reads on from the end of the prompt; the mark of the beginning stays where it is.
        head = ids[:1] if ids[0] == self._tokenizer.bos_token_id else []
        return [*head, *ids[len(ids) - (self._limit - len(head)) :]]


class _NanWatch:
    """Sees the logits of every step, and remembers in which rows there was a NaN."""

    def __init__(self) -> None:
        self._seen: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Minus infinity is how generate() itself forbids a token.
        bad = (scores.isnan() | scores.isposinf()).any(-1)
        self._seen = bad if self._seen is None else self._seen | bad
        return scores

    def rows(self, count: int) -> list[int]:
        if self._seen is None:
            return []
        return [row for row, bad in enumerate(self._seen.view(count, -1).any(1).tolist()) if bad]


class _Stopped:
    """Tells generate() which rows hold a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int) -> None:
        self._tokenizer, self._stops, self._start = tokenizer, stops, start

    def __call__(self, input_ids: torch.Tensor, scores: Any) -> torch.Tensor:
        texts = self._tokenizer.batch_decode(input_ids[:, self._start :], skip_special_tokens=True)
        stopped = [_stop_in(text, self._stops) is not None for text in texts]
        return torch.tensor(stopped, device=input_ids.device)


def _stop_in(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string begins, or None."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
