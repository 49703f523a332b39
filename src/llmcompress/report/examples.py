"""Examples on which a candidate answers otherwise than the base, with the words that differ marked."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..evaluation.tasks import ExampleResult, TaskScore
from ..evaluation.tasks.choices import letters

if TYPE_CHECKING:
    from ..comparison import Comparison, Entry
    from ..evaluation.tasks.task import Answer

MOST_SHOWN = 20
# Of those shown, at most so many that the candidate lost, as long as there are others.
_MOST_LOST = 12
_MOST_CHARACTERS = 1200


@dataclass(frozen=True)
class Piece:
    """A stretch of an answer; `marked` where the other model has it otherwise."""

    text: str
    marked: bool


@dataclass(frozen=True)
class Difference:
    """One example, and what both models answered. `gain` is below zero where the candidate lost."""

    number: int
    text: str
    label: str
    base: tuple[Piece, ...]
    candidate: tuple[Piece, ...]
    gain: float

    @property
    def kind(self) -> str:
        """What changed: `lost`, `won`, or `other`."""
        return "lost" if self.gain < 0 else "won" if self.gain > 0 else "other"


@dataclass(frozen=True)
class Differences:
    """Those shown of one candidate, of `total` among `examples`."""

    name: str
    total: int
    examples: int
    shown: tuple[Difference, ...]


def differences(comparison: Comparison, entry: Entry, task: int) -> Differences | None:
    """Return the examples that `entry` answers otherwise than the base, the worst losses first.

    None where the task keeps no answers, or the two were not asked the same.
    """
    base, own = comparison.base.evaluation.scores[task], entry.evaluation.scores[task]
    if not base.examples or len(base.examples) != len(own.examples):
        return None
    pairs = list(zip(base.examples, own.examples, strict=True))
    changed = [
        number
        for number, (ours, theirs) in enumerate(pairs)
        if ours.prediction is not None and theirs.prediction is not None and ours.prediction != theirs.prediction
    ]
    if not changed:
        return None
    gains = {number: _gain(*pairs[number], base) for number in changed}
    ranked = sorted(changed, key=lambda number: (gains[number], -_distance(*pairs[number]), number))
    lost = [number for number in ranked if gains[number] < 0]
    others = [number for number in reversed(ranked) if gains[number] > 0]
    others += [number for number in ranked if gains[number] == 0]
    enough_lost = max(_MOST_LOST, MOST_SHOWN - len(others))
    shown = [*lost[:enough_lost], *others][:MOST_SHOWN]
    texts = comparison.inputs[task] if task < len(comparison.inputs) else ()
    return Differences(
        entry.name,
        len(changed),
        len(pairs),
        tuple(
            _difference(number, texts[number] if number < len(texts) else "", *pairs[number], gains[number], base)
            for number in shown
        ),
    )


def marked(base: str, candidate: str) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Split two texts at their words into pieces that both have and pieces that only one has.

    Example:
        >>> ours, theirs = marked("a red cat", "a blue cat")
        >>> [piece.text for piece in theirs if piece.marked], "".join(piece.text for piece in ours)
        (['blue '], 'a red cat')
    """
    ours, theirs = _words(base), _words(candidate)
    matcher = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    left, right = [], []
    for kind, i, j, k, m in matcher.get_opcodes():
        if i < j:
            left.append(Piece("".join(ours[i:j]), kind != "equal"))
        if k < m:
            right.append(Piece("".join(theirs[k:m]), kind != "equal"))
    return tuple(left), tuple(right)


def _difference(
    number: int, text: str, ours: ExampleResult, theirs: ExampleResult, gain: float, score: TaskScore
) -> Difference:
    if isinstance(ours.prediction, str) and isinstance(theirs.prediction, str):
        base, candidate = marked(ours.prediction[:_MOST_CHARACTERS], theirs.prediction[:_MOST_CHARACTERS])
    elif _by_word(ours.prediction, theirs.prediction, score):
        base, candidate = _word_labels(ours.prediction, theirs.prediction, score, text)
    else:
        base, candidate = ((Piece(_text(one.prediction, score) + _sure(one), False),) for one in (ours, theirs))
    return Difference(number, text, _text(ours.label, score), base, candidate, gain)


def _gain(ours: ExampleResult, theirs: ExampleResult, score: TaskScore) -> float:
    """How much better the candidate did, by the primary metric or, failing that, by the first that examples have."""
    name = score.primary if score.primary in ours.values else next(iter(ours.values), None)
    if name is None or name not in theirs.values:
        return 0.0
    lower = name in score.kinds and score.kinds[name].lower_is_better
    # A squared error is no metric of the task's, and lower is better.
    better = theirs.values[name] - ours.values[name]
    return -better if lower or name not in score.kinds else better


def _distance(ours: ExampleResult, theirs: ExampleResult) -> float:
    if isinstance(ours.prediction, float) and isinstance(theirs.prediction, float):
        return abs(ours.prediction - theirs.prediction)
    return theirs.confidence or 0.0


def _words(text: str) -> list[str]:
    """Split after each run of spaces, so that the words joined are the text."""
    found, word = [], ""
    for sign in text:
        if word and word[-1].isspace() and not sign.isspace():
            found.append(word)
            word = ""
        word += sign
    return [*found, word] if word else found


def _by_word(ours: Answer | None, theirs: Answer | None, score: TaskScore) -> bool:
    return (
        isinstance(ours, tuple)
        and isinstance(theirs, tuple)
        and len(ours) == len(theirs)
        and "subset_accuracy" not in score.metrics
    )


def _word_labels(
    ours: Answer | None, theirs: Answer | None, score: TaskScore, text: str
) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
    """Write the labels of the words on which two models differ: `Ada: B-PER, Lovelace: I-PER`."""
    assert isinstance(ours, tuple)
    assert isinstance(theirs, tuple)
    at = [number for number, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    # A long text is stored cut short: its words can then only be numbered.
    words = text.split(" ") if text.count(" ") + 1 == len(ours) else [f"word {n + 1}" for n in range(len(ours))]
    left, right = (
        ", ".join(f"{words[number]}: {_text(answers[number], score)}" for number in at) for answers in (ours, theirs)
    )
    return (Piece(left, False),), (Piece(right, False),)


def _text(answer: Answer | None, score: TaskScore) -> str:
    if answer is None:
        return ""
    if isinstance(answer, tuple):
        return ", ".join(_text(one, score) for one in answer) or "none"
    if isinstance(answer, float):
        return f"{answer:.4g}"
    if isinstance(answer, int):
        names = score.classes or (letters(answer + 1) if score.task == "multiple_choice" else ())
        return names[answer] if 0 <= answer < len(names) else str(answer)
    return answer[:_MOST_CHARACTERS]


def _sure(result: ExampleResult) -> str:
    return f" ({result.confidence:.0%})" if result.confidence is not None else ""
