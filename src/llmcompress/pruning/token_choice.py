"""Which tokens the texts use, which of them stay, and the proof that the texts are split as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..data import Example
from ..errors import MissingInputError, VerificationError
from .tokenizer_cut import Alphabet, FastVocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts tokenised at a time.
_CHUNK = 1000
# What joins texts where language models read them as one stream.
_JOIN = "\n\n"


@dataclass(frozen=True)
class Choice:
    """The tokens that stay.

    Attributes:
        kept: their ids in the old numbering, ascending.
        tokenizer: the tokenizer that has no others.
        seen: how many different tokens the texts hold, special ones included.
        texts: how many texts there are.
        length: mean tokens a text before the cut, special tokens included.
        new_length: mean tokens a text after it.
        unknown: share of tokens that are the unknown token before the cut.
        new_unknown: the same after it.
    """

    kept: tuple[int, ...]
    tokenizer: PreTrainedTokenizerBase
    seen: int
    texts: int
    length: float
    new_length: float
    unknown: float
    new_unknown: float


def choose_tokens(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    keep: int | float | None,
    alphabet: Alphabet,
    named: Collection[int],
    multiple: int,
) -> Choice:
    """Choose the tokens that stay for these texts, and cut the tokenizer.

    Args:
        examples: the texts, and pairs of texts.
        tokenizer: a fast one; it is not changed.
        keep: None: all that are seen; an int: so many, the most frequent; a float: that share of them.
        alphabet: what unseen words are built from; see `VocabularyPruning`.
        named: ids that stay whatever the texts hold.
        multiple: their number is filled up to a multiple of this.

    Raises:
        MissingInputError: all texts are empty.
        UnsupportedModelError: a tokenizer that cannot be cut.
        VerificationError: without `keep`, a text is split otherwise than before.

    Example:
        >>> from llmcompress.testing import tiny_tokenizer
        >>> texts = [Example("a cat"), Example("a dog")]
        >>> found = choose_tokens(texts, tiny_tokenizer(), keep=None, alphabet="all", named=[5], multiple=1)
        >>> found.seen, len(found.kept), found.tokenizer.tokenize("a god")
        (8, 12, ['a', ' ', 'g', 'o', 'd'])
    """
    if not any(example.text.strip() or (example.pair or "").strip() for example in examples):
        raise MissingInputError("VocabularyPruning needs texts, and all that were passed are empty; pass others.")
    vocabulary = FastVocabulary(tokenizer)
    before = _Measured(tokenizer)
    for _, ids, counted in _encoded(examples, tokenizer):
        before.add(ids, counted)
    seen = before.counts
    always = {*vocabulary.fixed, *named}
    frequent = sorted(seen.keys() - always, key=lambda token: (-seen[token], token))
    if keep is not None:
        frequent = frequent[: keep if isinstance(keep, int) else max(1, round(keep * len(frequent)))]
    always |= vocabulary.alphabet(alphabet, seen.keys())
    kept = _filled({part for token in (*always, *frequent) for part in vocabulary.parts(token)}, vocabulary, multiple)
    new = vocabulary.keep(sorted(kept))
    if keep is None:
        changed = list(_changed(examples, tokenizer, new, sorted(kept)))
        missed = {token for text in changed for token in vocabulary.attempts(text)} - kept
        if missed:
            kept = _filled(kept | missed, vocabulary, multiple)
            new = vocabulary.keep(sorted(kept))
            changed = list(_changed(examples, tokenizer, new, sorted(kept)))
        if changed:
            raise VerificationError(
                f"VocabularyPruning: the pruned {type(tokenizer).__name__} splits {changed[0]!r:.80} otherwise than "
                f"before; nothing is returned. Please report this tokenizer, or allow other pieces with keep=1.0."
            )
        after = before
    else:
        after = _Measured(new)
        for _, ids, counted in _encoded(examples, new):
            after.add(ids, counted)
    return Choice(
        kept=tuple(sorted(kept)),
        tokenizer=new,
        seen=len(seen),
        texts=before.texts,
        length=before.length,
        new_length=after.length,
        unknown=before.unknown,
        new_unknown=after.unknown,
    )


class _Measured:
    """Counts the tokens of all texts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.counts: Counter[int] = Counter()
        self.texts = self._total = self._unknowns = 0
        self._unk = tokenizer.unk_token_id

    def add(self, ids: Sequence[int], counted: bool) -> None:
        self.counts.update(ids)
        if counted:
            self.texts += 1
            self._total += len(ids)
            self._unknowns += ids.count(self._unk) if self._unk is not None else 0

    @property
    def length(self) -> float:
        return self._total / self.texts

    @property
    def unknown(self) -> float:
        return self._unknowns / max(self._total, 1)


def _filled(kept: set[int], vocabulary: FastVocabulary, multiple: int) -> set[int]:
    """Return `kept` filled up to a multiple with the tokens of lowest id that need no others."""
    kept = set(kept)
    for token in sorted(vocabulary.tokens.keys() - kept):
        if len(kept) % multiple == 0:
            break
        if vocabulary.parts(token) <= kept | {token}:
            kept.add(token)
    return kept


def _encoded(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int], bool]]:
    """Yield each text with its tokens, and whether it counts as one.

    Language models read all texts joined: what stands where two meet is seen as well, and is no text by itself.
    """
    call: Any = tokenizer
    plain = {"truncation": False, "padding": False, "verbose": False}
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        texts = [text for example in chunk for text in (example.text, example.pair) if text is not None]
        yield from ((text, ids, True) for text, ids in zip(texts, call(texts, **plain)["input_ids"], strict=True))
        stream = _JOIN.join(example.text for example in chunk)
        yield stream, call(stream, add_special_tokens=False, **plain)["input_ids"], False


def _changed(
    examples: Sequence[Example], old: PreTrainedTokenizerBase, new: PreTrainedTokenizerBase, kept: Sequence[int]
) -> Iterator[str]:
    """Yield the texts that the new tokenizer splits otherwise."""
    for (text, before, _), (_, after, _) in zip(_encoded(examples, old), _encoded(examples, new), strict=True):
        if before != [kept[token] for token in after]:
            yield text
