"""Labels as a classifier counts its classes: by name where data and model have names, by index elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .data import Example


class ClassIndex(int):
    """A class index that the data also has a name for: that of a `datasets` column, or the digits in a table's cell.

    It is read by its name where the model has a class of this name, since the model may count its classes otherwise.

    Example:
        >>> ClassIndex(1, "spam") == 1, ClassIndex(1, "spam").name
        (True, 'spam')
    """

    name: str

    def __new__(cls, index: int, name: str) -> ClassIndex:
        """Put a name to an index."""
        found = super().__new__(cls, index)
        found.name = name
        return found

    def __getnewargs__(self) -> tuple[int, str]:  # type: ignore[override]
        return int(self), self.name  # so that it can be copied


def class_indices(model: PreTrainedModel) -> dict[str, int]:
    """Return the index of each class by its name, as the model's config has them."""
    return {str(name): int(index) for name, index in (getattr(model.config, "label2id", None) or {}).items()}


def by_class_names(examples: Sequence[Example], model: PreTrainedModel) -> list[Example]:
    """Return `examples` with every `ClassIndex` as the model counts its classes, where it has classes of these names.

    Upper and lower case are one. Where the model knows none of the names, or counts those it knows as the data does,
    the indices stay as they are.

    Raises:
        ConfigError: the model knows some of the names and counts them otherwise, and others it does not know.

    Example:
        >>> from llmcompress.data import Example
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("bert")
        >>> model.config.label2id = {"SPAM": 0, "HAM": 1}
        >>> by_class_names([Example("Dear sir", label=ClassIndex(1, "spam"))], model)[0].label
        0
    """
    used, known = _used_names(examples, model)
    if all(known[name] == used[name] for name in known):
        return [_mapped(one, int) for one in examples]
    if unknown := [name for name in used if name not in known]:
        raise ConfigError(
            f"data must name its classes as {type(model).__name__} does, got {', '.join(map(repr, unknown))} beside "
            f"{', '.join(map(repr, known))}, which config.label2id knows: {', '.join(class_indices(model))}; rename "
            "the classes in one of the two."
        )

    return [_mapped(one, lambda label: known[label.name]) for one in examples]


def _mapped(example: Example, index: Callable[[ClassIndex], int]) -> Example:
    """Put plain indices in place of an example's `ClassIndex`, if it has any."""

    def of(label: Any) -> Any:
        return index(label) if isinstance(label, ClassIndex) else label

    label = example.label
    return replace(example, label=tuple(map(of, label)) if isinstance(label, tuple) else of(label))


def foreign_names(examples: Sequence[Example], model: PreTrainedModel) -> str | None:
    """Return what a reader should know of labels that are read by their index though both sides name their classes."""
    used, known = _used_names(examples, model)
    theirs = class_indices(model)
    if known or all(name.isdecimal() for name in used) or all(_is_generic(*one) for one in theirs.items()):
        return None
    return (
        f"the data calls its classes {', '.join(used)} and the model {', '.join(theirs)}: labels were read by their "
        "index"
    )


def _is_generic(name: str, index: int) -> bool:
    return name in (f"LABEL_{index}", str(index))


def _used_names(examples: Iterable[Example], model: PreTrainedModel) -> tuple[dict[str, int], dict[str, int]]:
    """Return the names that labels come with, and those of them that the model knows, with the indices of each."""
    labels = (one for row in examples for one in (row.label if isinstance(row.label, tuple) else (row.label,)))
    used = {label.name: int(label) for label in labels if isinstance(label, ClassIndex)}
    exact = class_indices(model) if used else {}
    folded = {name.casefold(): index for name, index in exact.items()}
    if len(folded) < len(exact):
        folded = exact  # two classes that differ by their case alone
    found = {name: exact.get(name, folded.get(name.casefold())) for name in used}
    return used, {name: index for name, index in found.items() if index is not None}


def labels_are_flags(labels: Mapping[int, Sequence[Any]], classes: int) -> bool:
    """Tell whether sets of classes are given as 0 or 1 of every class; else they list the classes. All, or none.

    Read row by row, (0, 1) of two classes would be the second one also where all other rows list classes.

    Args:
        labels: of each row of the data that has one.
        classes: how many the model has.

    Raises:
        ConfigError: some rows can only be of the one form, and others only of the other.

    Example:
        >>> labels_are_flags({0: (0, 1), 1: (1, 1)}, 2), labels_are_flags({0: (0, 1), 1: (1,)}, 2)
        (True, False)
    """
    flags = {row for row, one in labels.items() if len(one) == classes and all(flag in (0, 1) for flag in one)}
    listed = next((row for row in labels if row not in flags), None)
    if listed is None:
        return True
    for row in sorted(flags):
        if len(set(labels[row])) < len(labels[row]):
            raise ConfigError(
                f"data[{row}].label must be a list of classes as that of data[{listed}], {labels[listed]!r}, got "
                f"{labels[row]!r}, a 0 or 1 of each class; write all rows in one of the two forms."
            )
    return False


def read_labels(model: PreTrainedModel, examples: Sequence[Example], *, regression: bool = False) -> list[int | float]:
    """Return the label of each example as a classifier wants it: a class index, or for regression a real number.

    Args:
        model: its config names the classes.
        examples: each has a label.
        regression: whether the head puts out a real number.

    Raises:
        ConfigError: a label is not one of the model's classes, or for regression no number.

    Example:
        >>> from llmcompress.data import Example
        >>> from llmcompress.testing import tiny_model
        >>> read_labels(tiny_model("bert"), [Example("good", label="LABEL_1"), Example("bad", label=0)])
        [1, 0]
    """
    names = class_indices(model)
    labels: list[int | float] = []
    for index, example in enumerate(by_class_names(examples, model)):
        label = example.label
        if regression:
            if not isinstance(label, (int, float)) or not math.isfinite(label):
                raise ConfigError(f"data[{index}].label must be a finite number for a regression head, got {label!r}.")
            labels.append(float(label))
            continue
        number = names.get(label) if isinstance(label, str) else label
        # The range first: what is in it is finite, and can be made an integer.
        if not isinstance(number, (int, float)) or not 0 <= number < model.config.num_labels or int(number) != number:
            raise ConfigError(
                f"data[{index}].label must be a class of {type(model).__name__} (0 to {model.config.num_labels - 1}, "
                f"or one of {', '.join(list(names)[:8])}), got {label!r}."
            )
        labels.append(int(number))
    return labels
