"""The verbs `list` and `tasks`: what there is to choose from, and what can be set."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..errors import PluginError
from .options import Json, check_endings, tell


def list_strategies(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help="strategies; all")] = None,
    json: Json = None,
) -> None:
    """List the strategies; of those that are named, each field with its default and what it means.

    llmcompress list

    llmcompress list gptq knowledge_distillation
    """
    from json import dumps

    from ..registry import compressors

    check_endings({".json": json})
    described, broken = [], []
    for name in names or compressors.list():
        try:
            described.append(_strategy(name, compressors.get(name)))
        except PluginError as error:
            if names:
                raise
            broken.append(str(error))  # one broken plug-in must not hide all others
    text = "\n\n".join(map(_fields_text, described)) if names else "\n".join(map(_summary_text, described))
    tell("\n".join([text, *broken]), dumps(described, indent=2), json)


def list_tasks(json: Json = None) -> None:
    """List the tasks, each with its settings."""
    from dataclasses import fields
    from json import dumps

    from ..registry import tasks

    check_endings({".json": json})
    found: dict[str, dict[str, Any]] = {}
    for name in tasks.list():
        task: Any = tasks.get(name)
        settings = [field.name for field in fields(task) if field.name not in {"data", "split", "tokenizer", "_"}]
        found[name] = {"summary": _summary(task), "settings": settings}
    lines = [
        f"{name}: {task['summary']}\n    settings: {', '.join(task['settings']) or 'none'}"
        for name, task in found.items()
    ]
    tell("\n".join(lines), dumps(found, indent=2), json)


def _strategy(name: str, cls: Any) -> dict[str, Any]:
    defaults = cls().model_dump(mode="json")  # what is set where nothing is: also what fields set together
    schema = cls.model_json_schema()["properties"] if cls.model_fields else {}
    fields = [
        {
            "name": field,
            "default": defaults[field],
            "description": info.description or "",
            "schema": {key: value for key, value in schema[field].items() if key not in {"title", "default"}},
        }
        for field, info in cls.model_fields.items()
    ]
    return {"name": name, "class": cls.__name__, "summary": _summary(cls), "fields": fields}


def _summary_text(strategy: dict[str, Any]) -> str:
    fields = ", ".join(field["name"] for field in strategy["fields"])
    return f"{strategy['name']}: {strategy['summary']}\n    fields: {fields or 'none'}"


def _fields_text(strategy: dict[str, Any]) -> str:
    from json import dumps

    lines = [f"{strategy['name']} (lc.{strategy['class']}): {strategy['summary']}"]
    for field in strategy["fields"]:
        lines.append(f"  {field['name']} = {dumps(field['default'])}\n      {field['description']}")
    return "\n".join(lines)


def _summary(cls: Any) -> str:
    return str(cls.__doc__ or "").strip().partition("\n")[0]
