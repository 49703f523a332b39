"""Two parts of a task: one to choose by, and one that no choice has seen, on which the loss is told."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data import Example
from ..errors import CompressionError
from ..evaluation.tasks import LanguageModeling, LMEvalTask
from .failures import reason_of

if TYPE_CHECKING:
    from ..evaluation.tasks import Task

# Share of the examples to choose by, and how many of them are enough.
_SHARE, _MOST = 1 / 3, 1000
_FEWEST = 4
# Pieces of a running text that has few paragraphs.
_PIECES = 30


def hold_out(task: Task, seed: int) -> tuple[Task, Task, str | None]:
    """Split the examples of `task` in two, a third to choose by.

    Returns:
        The task to choose by, the one to verify with, and a remark where they are the same: a drop that is told then is
        of examples by which the chain was chosen, and a little too good.

    Example:
        >>> from llmcompress.evaluation.tasks import TextClassification
        >>> choose, verify, remark = hold_out(TextClassification([("good", 1), ("bad", 0)] * 6), seed=0)
        >>> len(choose.examples), len(verify.examples), remark
        (4, 8, None)
    """
    if isinstance(task, LMEvalTask):
        # Of several benchmarks some would decide, by metrics of their own, and others verify.
        return task, task, _same("lm-eval reads its examples by itself")
    try:
        examples: Sequence[Any] = list(task.examples)
    except CompressionError:
        examples = []
    if isinstance(task, LanguageModeling):
        examples = _pieces(examples, task.join)
    if len(examples) < _FEWEST:
        return task, task, _same(f"it has {len(examples)} examples")
    order = list(range(len(examples)))
    if not isinstance(task, LanguageModeling):  # whose windows run on from text to text
        random.Random(seed).shuffle(order)
    count = min(max(round(_SHARE * len(examples)), 1), _MOST)
    parts = [[examples[index] for index in sorted(part)] for part in (order[:count], order[count:])]
    try:
        choose, verify = (dataclasses.replace(task, data=part) for part in parts)
    except Exception as error:  # a task of the user's own may not bear a part of its data
        return task, task, _same(reason_of(error))
    return choose, verify, None


def _pieces(texts: Sequence[Example], join: str) -> list[Example]:
    """Cut few long texts into pieces, at words."""
    if len(texts) >= _PIECES:
        return list(texts)
    words = join.join(text.text for text in texts).split(" ")
    size = max(len(words) // _PIECES, 1)
    return [Example(" ".join(words[start : start + size])) for start in range(0, len(words), size)]


def _same(why: str) -> str:
    return f"the task could not be split ({why}): the drop is told on the examples by which the chain was chosen"
