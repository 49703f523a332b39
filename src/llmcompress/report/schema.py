"""The one document that every rendering is made from: how it is written as JSON, and its JSON schema.

`python -m llmcompress.report.schema` writes the schema to standard output.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from ..evaluation.units import json_numbers

if TYPE_CHECKING:
    from ..comparison import Comparison

# What `json_numbers` writes for the numbers that JSON has not.
_WORDS = ("NaN", "Infinity", "-Infinity")


class _Generator(GenerateJsonSchema):
    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        number = super().float_schema(schema)
        return {"anyOf": [number, {"enum": list(_WORDS)}]}


def document(comparison: Comparison) -> dict[str, Any]:
    """Return `comparison` as dicts, lists and what JSON can hold; a number that is none becomes a word: `"NaN"`."""
    found: dict[str, Any] = json_numbers(comparison.model_dump(mode="json"))
    return found


def json_schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of what `document` returns.

    Example:
        >>> json_schema()["properties"]["format_version"]["const"]
        1
    """
    from ..comparison import Comparison

    schema = Comparison.model_json_schema(schema_generator=_Generator, mode="serialization")
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "title": "llmcompress comparison"}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
