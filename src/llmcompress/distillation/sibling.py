"""Students that are models of their own: built from a config, or as they lie in a folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import transformers

from ..anatomy.empty import empty_of_class
from ..errors import ConfigError, UnsupportedModelError
from .sources import LABELLED, InMemory, Source, auto_class, config_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# What a student of another architecture takes over from its teacher.
_SHARED = (
    "vocab_size",
    "id2label",
    "label2id",
    "problem_type",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "decoder_start_token_id",
)


def config_fields(student: object, field: str) -> dict[str, Any] | None:
    """Return the fields of a config that was given as a dict or a JSON file, or None where it is a model.

    Raises:
        ConfigError: the file is absent, or holds no JSON object.
    """
    if isinstance(student, dict):
        return student
    if not isinstance(student, str) or not student.endswith(".json"):
        return None
    try:
        fields = json.loads(Path(student).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{field} must be a JSON file with a config, got {student!r}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{field} must be a JSON file with an object, got {type(fields).__name__} in {student!r}.")
    return fields


def class_from(
    model: PreTrainedModel, fields: dict[str, Any], field: str
) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return class and config of a student that `fields` describe.

    Without `model_type` all that they leave open is as in `model`; with it, tokens and labels are taken over and the
    rest is the architecture's default.

    Raises:
        ConfigError: an architecture or field that transformers does not know, or values that build no model.
        UnsupportedModelError: the architecture has no head of this kind.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> cls, config = class_from(tiny_model("bert"), {"num_hidden_layers": 1}, "student")
        >>> cls.__name__, config.num_hidden_layers, config.hidden_size
        ('BertForSequenceClassification', 1, 64)
    """
    own = model.config.to_dict()
    kind = fields.get("model_type", model.config.model_type)
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"{field} must have a model_type that transformers knows, got {kind!r}.")
    cls = transformers.CONFIG_MAPPING[kind]
    taken = {name: value for name, value in own.items() if "model_type" not in fields or name in _SHARED}
    taken = {name: value for name, value in taken.items() if name not in ("architectures", "_name_or_path")}
    same = kind == model.config.model_type
    auto = auto_class(model)
    if not same and cls not in auto._model_mapping:
        raise UnsupportedModelError(
            f"{field} must have the head of {type(model).__name__}, and {auto.__name__} knows no {kind!r}."
        )
    built = type(model) if same else auto._model_mapping[cls]
    try:
        known = {*cls().to_dict(), *cls.attribute_map, *own, "num_labels"}
        config = cls.from_dict({**taken, **fields})
        empty_of_class(built, config)
    except Exception as error:  # whatever a config or a class raises, it is about what was given
        raise ConfigError(f"{field}={fields!r} builds no {built.__name__}: {type(error).__name__}: {error}") from error
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"{field} has the field {unknown[0]!r}, which {cls.__name__} does not know.")
    return built, config


def empty_sibling(model: PreTrainedModel, source: Source, field: str) -> PreTrainedModel:
    """Return a student from elsewhere, without its weights, under the kind of head that `model` has.

    Raises:
        ConfigError: there is no such folder or name.
        UnsupportedModelError: it cannot have that head.
    """
    if isinstance(source, InMemory):
        return source.model
    config = copy.deepcopy(config_of(source, field))
    auto = auto_class(model)
    if type(config) not in auto._model_mapping:
        raise UnsupportedModelError(
            f"{field} must be a model that {auto.__name__} loads, as the teacher is, got {source!r} "
            f"({type(config).__name__})."
        )
    if auto.__name__ in LABELLED:
        config.id2label, config.label2id = model.config.id2label, model.config.label2id
    return empty_of_class(auto._model_mapping[type(config)], config)
