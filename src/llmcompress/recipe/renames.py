"""What recipes of earlier releases say in other words, put into the words of this one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError

VERSION = 1
"""The newest format of recipe files; a file that names none has this one."""

Fields = dict[str, Any]


def _hidden_is_a_feature(fields: Fields) -> Fields:
    weight = fields.pop("hidden")
    features = fields.get("features") or {}
    if not isinstance(features, Mapping) or "hidden" in features:
        raise ConfigError(
            "KnowledgeDistillation must have the weight of hidden states once, got hidden and features; keep features.",
            location=("hidden",),
        )
    # Zero meant that they are not looked at; a weight among the features is above zero.
    return {**fields, "features": {"hidden": weight, **features} if weight else dict(features)}


_RENAMED: Mapping[tuple[str, str], tuple[str, Callable[[Fields], Fields]]] = {
    ("knowledge_distillation", "hidden"): ("features: {hidden: ...}", _hidden_is_a_feature),
}
"""Strategy and old field: what it is now, for the message, and the function that rewrites the fields."""


def renamed(name: str, fields: Mapping[str, Any]) -> tuple[Fields, list[tuple[str, str]]]:
    """Return the fields of a strategy in today's words, and which old ones were replaced by what.

    Raises:
        ConfigError: an old field and the one that replaced it are both there.

    Example:
        >>> renamed("knowledge_distillation", {"hidden": 0.5, "epochs": 1})
        ({'epochs': 1, 'features': {'hidden': 0.5}}, [('hidden', 'features: {hidden: ...}')])
    """
    found, replaced = dict(fields), []
    for (strategy, field), (now, rewrite) in _RENAMED.items():
        if strategy == name and field in found:
            found = rewrite(found)
            replaced.append((field, now))
    return found, replaced
