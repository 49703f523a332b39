"""The JSON schema of recipe files, for editors: every strategy with its fields, made from the strategies themselves.

`python -m llmcompress.recipe.schema` writes it to standard output; `docs/recipe.schema.json` is that of the library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from ..registry import compressors
from .renames import VERSION

_CHAIN = "pipeline"
_STEP: dict[str, Any] = {"$ref": "#/$defs/step"}


def json_schema(names: Iterable[str] | None = None) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of a recipe file.

    Args:
        names: strategies that a step may have; None: all, those of plug-ins among them.

    Raises:
        UnknownNameError: there is no such strategy.

    Example:
        >>> schema = json_schema(["magnitude_pruning"])
        >>> schema["$defs"]["magnitude_pruning"]["properties"]["sparsity"]["exclusiveMaximum"]
        1
    """
    chosen = sorted({*(compressors.list() if names is None else names)} - {_CHAIN})
    defs: dict[str, Any] = {}
    for name in chosen:
        defs.update(_strategy(name))
    steps = {"type": "array", "minItems": 1, "items": _STEP, "description": "the steps, first to last"}
    recover = {
        "anyOf": [{"type": "null"}, _STEP],
        "description": "a knowledge_distillation that is run behind each step that changes weights",
    }
    chain = {"type": "object", "properties": {"name": {"const": _CHAIN}, "steps": steps, "recover": recover}}
    defs[_CHAIN] = {**chain, "required": ["steps"], "additionalProperties": False}
    # By the name and not as one of many: an editor then tells what is wrong with that strategy's fields.
    named = {"type": "object", "properties": {"name": {"enum": [*chosen, _CHAIN]}}, "required": ["name"]}
    fields = [
        {"if": {"properties": {"name": {"const": name}}}, "then": {"$ref": f"#/$defs/{name}"}}
        for name in (*chosen, _CHAIN)
    ]
    defs["step"] = {"anyOf": [{"enum": chosen}, {**named, "allOf": fields}]}
    top = {
        "version": {"const": VERSION, "description": "of this format"},
        "description": {"type": "string", "description": "what the recipe is for; not read"},
    }
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        "title": "llmcompress recipe",
        "type": "object",
        "properties": {**top, **chain["properties"]},  # type: ignore[dict-item]
        "required": ["steps"],
        "additionalProperties": False,
        "$defs": defs,
    }


def _strategy(name: str) -> dict[str, Any]:
    """Return the definitions of a strategy and of what its fields hold."""
    cls: Any = compressors.get(name)
    schema = cls.model_json_schema(ref_template="#/$defs/{model}")
    inner = {key: _clean(value) for key, value in schema.pop("$defs", {}).items() if key != "Compressor"}
    own = _clean(schema)
    own["description"] = str(cls.__doc__ or "").strip().partition("\n")[0]
    own["properties"] = {"name": {"const": name}, **own.get("properties", {})}
    own["required"] = ["name", *own.get("required", [])]
    return {**inner, name: own}


def _clean(schema: Any) -> Any:
    """Drop titles, which repeat the fields' names, and let a field that holds a step be any step."""
    if isinstance(schema, Mapping):
        if schema.get("$ref") == "#/$defs/Compressor":
            return dict(_STEP)
        return {
            key: {name: _clean(one) for name, one in value.items()} if key == "properties" else _clean(value)
            for key, value in schema.items()
            if key != "title"
        }
    return [_clean(one) for one in schema] if isinstance(schema, list) else schema


if __name__ == "__main__":
    built_in = [name for name in compressors if compressors.get(name).__module__.startswith("llmcompress.")]
    sys.stdout.write(json.dumps(json_schema(built_in), indent=1) + "\n")
