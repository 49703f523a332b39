"""Which augmentation `KnowledgeDistillation.augment` holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from ..errors import ConfigError, did_you_mean
from .masked_words import MaskedWords
from .random_spans import RandomSpans

_DEFAULT = "masked_words"
_KINDS = {_DEFAULT: MaskedWords, "random_spans": RandomSpans}


def read_augmentation(given: Any) -> Any:
    """Return what a recipe holds for an augmentation, with the name that it may leave out.

    Raises:
        ConfigError: there is none of that name.

    Example:
        >>> read_augmentation({"model": "bert-base-uncased"})["name"]
        'masked_words'
        >>> read_augmentation({"name": "random_span"})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: KnowledgeDistillation.augment.name must be one of masked_words, ...
    """
    if not isinstance(given, Mapping):
        return given
    name = given.get("name", _DEFAULT)
    if name not in _KINDS:
        raise ConfigError(
            f"KnowledgeDistillation.augment.name must be one of {', '.join(_KINDS)}, got {name!r}"
            f"{did_you_mean(str(name), _KINDS)}."
        )
    return {**given, "name": name}


Augmentation = Annotated[MaskedWords | RandomSpans, Field(discriminator="name"), BeforeValidator(read_augmentation)]
