"""More texts out of few: words replaced by others that a masked language model finds fitting there."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field, PlainSerializer, PlainValidator
from tqdm.auto import tqdm

from ..compressor import Settings
from ..data import Example
from ..errors import ConfigError, MissingInputError, UnsupportedModelError
from .heads import head_of
from .sources import Source, empty_of, load_source, read_source, tokenizer_of, told

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FIELD = "MaskedWords.model"
# Logits over the vocabulary are the most of what a batch takes.
_BATCH = 16
# Of pieces that begin a word, in byte-level and sentencepiece vocabularies.
_MARKS = ("Ġ", "▁")


class MaskedWords(Settings):
    """Copies of each text with some words replaced by a masked language model (TinyBERT, arXiv 1909.10351).

    Each word is masked once, the model's likeliest words for its place are its candidates, and in each copy every word
    is replaced with probability `share` by one of them. The copies have no label: the student learns from them what the
    teacher makes of them.

    Args:
        model: the masked language model: a folder, a name on the hub or a model; its tokenizer lies beside it.
        copies: of each text.
        share: probability of a word to be replaced, in (0, 1].
        candidates: likeliest words of which one is drawn.

    Example:
        >>> MaskedWords(model="bert-base-uncased", copies=0)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: MaskedWords.copies must be in (0, inf), got 0.
    """

    name: Literal["masked_words"] = Field("masked_words", description="which augmentation it is")
    model: Annotated[Source, PlainValidator(lambda value: read_source(value, _FIELD)), PlainSerializer(told)] = Field(
        description="the masked language model: a folder, a name on the hub or a model"
    )
    copies: int = Field(4, gt=0, description="of each text")
    share: float = Field(0.4, gt=0, le=1, description="probability of a word to be replaced")
    candidates: int = Field(15, gt=0, description="likeliest words of which one is drawn")

    @property
    def does(self) -> str:
        """What a plan says of it."""
        return f"add {self.copies} copies of each text with {self.share:.0%} of the words replaced"

    def check(self) -> PreTrainedTokenizerBase:
        """Refuse what is no masked language model with a tokenizer; return the tokenizer. Reads no weights.

        Raises:
            ConfigError: there is no such model.
            UnsupportedModelError: it has another head.
            MissingInputError: no tokenizer with a mask token lies beside it.
        """
        model = empty_of(self.model, _FIELD)
        if head_of(model) != "masked_lm":
            raise UnsupportedModelError(
                f"{_FIELD} must be a masked language model, got {type(model).__name__}; take one that "
                f"AutoModelForMaskedLM loads."
            )
        tokenizer = tokenizer_of(self.model)
        if tokenizer is None or tokenizer.mask_token_id is None:
            raise MissingInputError(
                f"{_FIELD} needs a tokenizer with a mask token beside it, and {self.model!r} has none; save it there."
            )
        return tokenizer

    def copies_of(
        self, examples: Sequence[Example], *, device: torch.device | str, seed: int, progress: bool
    ) -> list[Example]:
        """Return the copies, without labels; a copy in which nothing was replaced is left out.

        Raises:
            ConfigError: the examples hold questions or words with tags, whose answers depend on each word.
        """
        marked = next((i for i, one in enumerate(examples) if one.words is not None), None)
        if marked is not None:
            raise ConfigError(
                f"KnowledgeDistillation.augment must be None for words with tags, got MaskedWords and data[{marked}]."
            )
        tokenizer, model = self.check(), load_source(self.model, _FIELD)
        before = model.device
        model.to(device)
        choices = {}
        texts = sorted({text for one in examples for text in (one.text, one.pair) if text is not None}, key=len)
        bar = tqdm(texts, desc="replace words", disable=not progress, leave=False)
        for text in bar:
            choices[text] = _candidates(text, model, tokenizer, self.candidates)
        model.to(before)
        draw = random.Random(seed)
        made = []
        for example in examples:
            for _ in range(self.copies):
                text = _varied(example.text, choices[example.text], self.share, draw)
                pair = example.pair and _varied(example.pair, choices[example.pair], self.share, draw)
                if (text, pair) != (example.text, example.pair):
                    made.append(replace(example, text=text, pair=pair, label=None))
        return made


def _varied(text: str, choices: list[list[str]], share: float, draw: random.Random) -> str:
    words = text.split()
    return " ".join(
        draw.choice(fitting) if fitting and draw.random() < share else word
        for word, fitting in zip(words, choices, strict=True)
    )


@torch.inference_mode()
def _candidates(text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, most: int) -> list[list[str]]:
    """Return for each word of a text the words that the model finds likeliest in its place, other than it."""
    words = text.split()
    found: list[list[str]] = [[] for _ in words]
    places = [place for place, word in enumerate(words) if any(letter.isalnum() for letter in word)]
    mask = tokenizer.mask_token
    for at in range(0, len(places), _BATCH):
        some = places[at : at + _BATCH]
        hidden = [" ".join([*words[:place], mask, *words[place + 1 :]]) for place in some]
        inputs = tokenizer(hidden, return_tensors="pt", padding=True, truncation=True).to(model.device)
        logits = model(**inputs).logits
        for row, place in enumerate(some):
            where = (inputs["input_ids"][row] == tokenizer.mask_token_id).nonzero().flatten()
            if len(where):  # else it stands behind what the model reads
                # Twice as many, since some are pieces of words.
                top = logits[row, where[0]].topk(min(2 * most, logits.shape[-1])).indices.tolist()
                found[place] = [word for word in _words(top, tokenizer) if word.lower() != words[place].lower()][:most]
    return found


def _words(ids: list[int], tokenizer: Any) -> list[str]:
    """Return those of the tokens that are whole words."""
    special = set(tokenizer.all_special_ids)
    pieces = [
        piece for token, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True) if token not in special
    ]
    if any(piece.startswith(_MARKS) for piece in pieces):
        pieces = [piece[1:] for piece in pieces if piece.startswith(_MARKS)]
    return [piece for piece in pieces if piece.isalpha()]
