"""SQuAD's metrics, as its official script defines them."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower the case, drop punctuation and the articles a, an, the, and make every white space one blank.

    As the official script does, https://rajpurkar.github.io/SQuAD-explorer, evaluate-v2.0.py.

    Example:
        >>> normalize_answer("  The U.S.  Army, an\\tarmy")
        'us army army'
    """
    bare = text.lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 if the normalised prediction is one of the answers, else 0; no answers are answered by no text.

    Example:
        >>> exact_match("the Rome.", ["Milan", "Rome"]), exact_match("Rome", [])
        (1.0, 0.0)
    """
    return float(normalize_answer(prediction) in {normalize_answer(answer) for answer in _real(answers)})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Return the F1 of the words shared with the answer that shares most, in [0, 1].

    Example:
        >>> round(f1("in old Rome", ["Rome", "the old Rome"]), 4)
        0.8
    """
    return max(_f1(normalize_answer(prediction).split(), normalize_answer(answer).split()) for answer in _real(answers))


def _real(answers: Sequence[str]) -> Sequence[str]:
    # The script leaves out answers of which normalising leaves nothing; where none is left, the right answer is none.
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def _f1(prediction: list[str], answer: list[str]) -> float:
    if not prediction or not answer:
        return float(prediction == answer)
    shared = (Counter(prediction) & Counter(answer)).total()
    return 2 * shared / (len(prediction) + len(answer))
