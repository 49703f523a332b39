"""What several verbs share: options of one name and meaning, the task they describe, and how a verb answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CheckpointError, ConfigError, UnknownNameError, did_you_mean
from ..places import check_place, told_if_unwritable

if TYPE_CHECKING:
    from ..data import Example

Model = Annotated[str, typer.Argument(metavar="MODEL", help="model folder or hub name")]
Recipe = Annotated[Path, typer.Option("--recipe", metavar="FILE", help="the steps, in YAML")]
TaskName = Annotated[
    str, typer.Option("--task", metavar="NAME", help="text_classification, language_modeling, ...: `llmcompress tasks`")
]
Data = Annotated[
    str, typer.Option("--data", metavar="DATA", help=".csv, .tsv, .jsonl, .json or .txt file, or hub data set")
]
Split = Annotated[str, typer.Option(metavar="NAME", help="split of a hub data set")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="FIELD=VALUE", help="setting of the task, such as window=256; may be repeated"),
]
TokenizerFolder = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="NAME", help="folder or hub name of a tokenizer, if the model's folder has none"
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, metavar="N", help="examples a batch, at most")]
Threads = Annotated[int | None, typer.Option(min=1, metavar="N", help="threads of torch; else torch's own choice")]
StepData = Annotated[
    str | None,
    typer.Option("--data", metavar="DATA", help="what steps calibrate on or train with: a file or hub data set"),
]
DataSplit = Annotated[str, typer.Option(metavar="NAME", help="split of --data, if it is a hub data set")]
TaskData = Annotated[str, typer.Option(metavar="DATA", help="what --task is scored on: a file or hub data set")]
Progress = Annotated[bool, typer.Option(help="show progress bars")]
Html = Annotated[Path | None, typer.Option(metavar="FILE", help="write the report as one HTML page")]
Seed = Annotated[int, typer.Option(min=0, metavar="N", help="seeds every step")]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="also write everything as JSON; - prints it instead of the table"),
]

PRINTED = Path("-")
_ONLY_PYTHON = "custom"


def tell(text: str, document: str, json: Path | None) -> None:
    """Print `text` and write `document` to the file that `--json` names; where that is `-`, print only `document`."""
    if json == PRINTED:
        typer.echo(document)
        return
    typer.echo(text)
    if json is not None:
        with told_if_unwritable(json):
            json.parent.mkdir(parents=True, exist_ok=True)
            json.write_text(document, encoding="utf-8")


def check_endings(places: Mapping[str, Path | None]) -> None:
    """Refuse a file whose name does not end as its content does, or that cannot be written; `-` is no file.

    Raises:
        ConfigError: naming the file.
        CheckpointError: naming the file.
    """
    for ending, place in places.items():
        if place is None or place == PRINTED:
            continue
        if place.suffix.lower() != ending:
            raise ConfigError(f"the file must end in {ending}, got {str(place)!r}.")
        check_place(place)


def check_folder(out: Path) -> None:
    """Refuse a folder that holds something else, or that cannot be written: now, not when hours of work are to be.

    Raises:
        CheckpointError: naming the folder.
    """
    from ..checkpoint import refuse_foreign

    refuse_foreign(out)
    if not out.exists():
        check_place(out)


def make_task(name: str, data: str, split: str, settings: Sequence[str] | None) -> Any:
    """Build the task that `--task`, `--data`, `--split` and `--set` describe.

    Raises:
        UnknownNameError: no task has this name.
        ConfigError: the task needs Python; or a setting is none of the task's, or out of range.
    """
    from dataclasses import fields

    from ..registry import tasks as known

    if name == _ONLY_PYTHON:
        raise ConfigError(
            f"--task {name} needs a function of yours, which only Python can pass: lc.CustomTask(data, function=...)."
        )
    if name not in known:
        names = [one for one in known if one != _ONLY_PYTHON]
        raise UnknownNameError(
            f"no task is called {name!r}{did_you_mean(name, names) or '.'} --task must be one of: {', '.join(names)}."
        )
    task: Any = known.get(name)
    allowed = {field.name: field.type for field in fields(task) if field.name not in {"data", "split", "tokenizer"}}
    given: dict[str, Any] = {"split": split}
    for text in settings or ():
        field, equals, value = text.partition("=")
        if not equals or field not in allowed:
            raise ConfigError(
                f"--set must be FIELD=VALUE with a field of {name}, got {text!r}{did_you_mean(field, allowed) or '.'} "
                f"It has: {', '.join(sorted(allowed))}."
            )
        given[field] = value if _is_text(allowed[field]) else _plain(field, value)
    return task(data, **given)


def _is_text(declared: Any) -> bool:
    """Tell whether a field is declared as text, by its annotation or what that is written as.

    >>> [_is_text(one) for one in ("str", "str | None", str | None, "int | None", "Sequence[str]", "str | int")]
    [True, True, True, False, False, False]
    """
    return declared in (str, str | None, "str", "str | None", "str | Path | None")


def _plain(field: str, value: str) -> Any:
    """Read a value as a recipe would: `2:4` and `no` are texts, `[a, b]` is a list."""
    from ..recipe.document import read

    try:
        return read(value).plain() if value.strip() else None
    except ConfigError as error:
        raise ConfigError(f"--set {field} must be a YAML value, got {value!r}.") from error


def read_data(source: str | None, split: str) -> list[Example] | None:
    """Return the examples of `source`, or None where none is named.

    Raises:
        CompressionError: `load_examples` cannot read it.
    """
    from ..data import load_examples

    return None if source is None else load_examples(source, split=split)


def name_places(given: Sequence[str], what: str, usual: Callable[[Path], str]) -> dict[str, str]:
    """Name what was given as `[NAME=]PLACE`, by `usual` where there is no name.

    Raises:
        ConfigError: two have the same name; `what` they are is said.

    Example:
        >>> name_places(["models/bert", "small=out/model"], "model", lambda place: place.name)
        {'bert': 'models/bert', 'small': 'out/model'}
    """
    named: dict[str, str] = {}
    for text in given:
        name, equals, place = text.partition("=")
        if not equals or Path(text).exists():
            name, place = usual(Path(text)) or text, text
        if name in named:
            raise ConfigError(
                f"every {what} must have a name of its own, got {name!r} twice; write NAME={place} for one of them."
            )
        named[name] = place
    return named


def read_tokenizer(folder: str | None) -> Any:
    """Return the tokenizer of `folder`, or None where none is named.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if folder is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"--tokenizer {folder} cannot be loaded: {str(error).splitlines()[0]}") from error
