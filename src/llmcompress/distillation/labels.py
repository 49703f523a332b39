"""Labels of examples as each head wants them, and the refusal of those that it does not know."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..class_labels import class_indices, labels_are_flags, read_labels
from ..data import LABELLED, Example, Span
from ..errors import ConfigError, MissingInputError, did_you_mean
from .heads import IGNORED, Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_labels(head: Head, model: PreTrainedModel, examples: Sequence[Example]) -> None:
    """Refuse examples that have no target for the hard loss of this head; the tokens of a text are theirs.

    Raises:
        MissingInputError: an example has no label (for seq2seq: no second text).
        ConfigError: a label is not one of the model's classes, for regression no number, for tags not one a word, for a
            question no text of its context; multi-label labels are of two forms.
    """
    if head in {"causal_lm", "masked_lm"}:
        return
    if head == "seq2seq_lm":
        bare = next((index for index, example in enumerate(examples) if not example.pair), None)
        if bare is not None:
            raise MissingInputError(
                f"KnowledgeDistillation needs target texts for the hard loss of {type(model).__name__}, and "
                f"data[{bare}] has none; pass rows with 'text' and 'text_pair', or alpha=1.0 to learn from the teacher "
                f"alone."
            )
        return
    bare = next((index for index, example in enumerate(examples) if example.label is None), None)
    if bare is not None:
        raise MissingInputError(
            f"KnowledgeDistillation needs labels for its hard loss, and data[{bare}] has none; pass {LABELLED}; or "
            f"alpha=1.0 to learn from the teacher alone."
        )
    labels_of(head, model, examples)


def labels_of(head: Head, model: PreTrainedModel, examples: Sequence[Example]) -> list[Any]:
    """Return the label of each example as the head wants it, None where it has none.

    A class index; for regression a number; for multi-label 0 or 1 of each class; for tokens a class index a word; for a
    question a `Span` of the context.

    Raises:
        ConfigError: as `check_labels`.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> labels_of("multi_label", tiny_model("bert"), [Example("a", label=("LABEL_1",)), Example("b", label=())])
        [[0, 1], [0, 0]]
    """
    if head == "question_answering":
        return [None if one.label is None else _span(f"data[{i}]", one) for i, one in enumerate(examples)]
    if head == "multi_label":
        return _sets(model, examples)
    if head == "token_classification":
        return [None if one.label is None else _tags(f"data[{i}]", one, model) for i, one in enumerate(examples)]
    known = [index for index, example in enumerate(examples) if example.label is not None]
    if len(known) == len(examples):
        return list(read_labels(model, examples, regression=head == "regression"))
    labels: list[Any] = [None] * len(examples)
    for index, label in zip(
        known, read_labels(model, [examples[i] for i in known], regression=head == "regression"), strict=True
    ):
        labels[index] = label
    return labels


def _sets(model: PreTrainedModel, examples: Sequence[Example]) -> list[list[int] | None]:
    """Read all labels in one form: 0 or 1 of each class if every row can be that, else lists of classes."""
    count = model.config.num_labels
    given = {i: _classes(f"data[{i}]", one, model) for i, one in enumerate(examples) if one.label is not None}
    flags = labels_are_flags(given, count)
    sets: list[list[int] | None] = [None] * len(examples)
    for index, label in given.items():
        chosen = () if flags else {_class(f"data[{index}]", one, model) for one in label}
        sets[index] = [int(one) for one in label] if flags else [int(number in chosen) for number in range(count)]
    return sets


def _classes(where: str, example: Example, model: PreTrainedModel) -> tuple[Any, ...]:
    if not isinstance(example.label, tuple):
        raise ConfigError(
            f"{where}.label must be a list of classes for the multi-label {type(model).__name__}, got "
            f"{example.label!r}; pass for instance ['toxic', 'threat'] or [0, 1, 1]."
        )
    return example.label


def _tags(where: str, example: Example, model: PreTrainedModel) -> list[int]:
    given = example.label
    if not isinstance(given, tuple) or example.words is None or len(given) != len(example.words):
        raise ConfigError(
            f"{where} must have words and one tag a word for {type(model).__name__}, got {given!r:.80}; pass rows with "
            f"'tokens' and 'tags'."
        )
    return [IGNORED if tag == IGNORED else _class(where, tag, model) for tag in given]


def _class(where: str, label: Any, model: PreTrainedModel) -> int:
    names = class_indices(model)
    number: Any = names.get(label) if isinstance(label, str) else label
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    # The range first: what is in it is finite, and can be made an integer.
    if not is_number or not 0 <= number < model.config.num_labels or int(number) != number:
        hint = did_you_mean(label, names) if isinstance(label, str) else ""
        raise ConfigError(
            f"{where}.label must be of the classes of {type(model).__name__} (0 to {model.config.num_labels - 1}, or "
            f"{', '.join(list(names)[:8])}), got {label!r}{hint or '.'}"
        )
    return int(number)


def _span(where: str, example: Example) -> Span:
    given, context = example.label, example.pair
    if context is None:
        raise ConfigError(f"{where} must have a context for its question; pass rows with 'question' and 'context'.")
    if isinstance(given, Span):
        if not 0 <= given.start <= given.end <= len(context):
            raise ConfigError(
                f"{where}.label must be a Span within the {len(context)} characters of its context, start before end, "
                f"got {given!r}; Span(0, 0) is no answer."
            )
        return given
    text = given[0] if isinstance(given, tuple) and given else given
    if not isinstance(text, str):
        raise ConfigError(f"{where}.label must be an answer, a text or a Span of the context, got {given!r:.80}.")
    start = context.find(text)
    if start < 0:
        raise ConfigError(f"{where}.label must be a text that stands in its context, got {text!r:.80}.")
    return Span(start, start + len(text))
