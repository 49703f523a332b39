"""Signs that a generator has collapsed: loops, empty texts, one text for every prompt."""

from __future__ import annotations

from collections.abc import Sequence

# More than this share of all texts makes a warning: a few loops are found in any greedy decoding of a small model.
_MANY = 0.1
_NGRAM = 4
_FEWEST_LOOPED = 8


def loops(tokens: Sequence[int]) -> bool:
    """Whether the last half of a text is one short piece, said three times or more.

    Args:
        tokens: the generated tokens; fewer than 16 are never called a loop.

    Example:
        >>> loops([5, 9, 8, 1] * 2 + [1, 2, 3] * 4), loops(list(range(20)))
        (True, False)
    """
    tail = tokens[len(tokens) // 2 :]
    if len(tail) < _FEWEST_LOOPED:
        return False
    return any(tail[period:] == tail[:-period] for period in range(1, len(tail) // 3 + 1))


def distinct(texts: Sequence[str]) -> float | None:
    """Return the mean share of different 4-grams of words among a text's, or None if no text has as many words.

    Example:
        >>> distinct(["a b c d a b c d", "one two"]), distinct(["a b"])
        (0.8, None)
    """
    shares = []
    for words in map(str.split, texts):
        grams = [tuple(words[at : at + _NGRAM]) for at in range(len(words) - _NGRAM + 1)]
        if grams:
            shares.append(len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else None


def collapse_warnings(texts: Sequence[str], references: Sequence[str], looping: int) -> list[str]:
    """Say what is wrong with `texts` as a whole; nothing if nothing is.

    Args:
        texts: what was generated.
        references: the first reference of each: what is normal.
        looping: how many texts end in a loop.

    Example:
        >>> collapse_warnings(["", "", "yes"], ["a", "b", "c"], looping=0)
        ['collapse: 2 of 3 texts are empty']
    """
    found = []
    empty = sum(not text for text in texts)
    if empty > _MANY * len(texts):
        found.append(f"collapse: {empty} of {len(texts)} texts are empty")
    if looping > _MANY * len(texts):
        found.append(f"collapse: {looping} of {len(texts)} texts end in one piece repeated again and again")
    ours, normal = distinct(texts), distinct(references)
    if ours is not None and normal is not None and ours < normal / 2:
        found.append(
            f"collapse: only {ours:.0%} of the {_NGRAM}-grams in a text are different, in the references {normal:.0%}"
        )
    if len(texts) > 1 and len(set(texts)) == 1 and texts[0] and len(set(references)) > 1:
        found.append(f"collapse: every prompt was answered by {texts[0]!r:.80}")
    return found
