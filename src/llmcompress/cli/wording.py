"""What an error of the library says, in the words of the command line.

The library speaks of arguments and classes of Python. Whoever typed a command knows options, rows of files, and the
names that recipes and `--task` use. All are told from what is declared: the parameters of the verb, the registries.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from ..errors import CompressionError, UnknownNameError

# `data[3].label`; `tokenizer=AutoTokenizer.from_pretrained(...)`; `TextClassification.average`; `show()`; and what a
# message begins with, `fit.size must`. Behind a quotation mark or a slash is what the user wrote, before a line a file.
_PYTHON = re.compile(
    r"(?<![\w'\"./-])(?:"
    r"(?P<rows>(?:[A-Z]\w*\.)?[a-z_]+)\[(?P<index>\d+)\](?:\.(?P<column>[a-z_]+))?"
    r"|(?P<keyword>[a-z_]+)=(?:(?P<value>'[^']*'|\d[\w.]*)|\[[^\]]*\]|[\w.]+\([^()]*\)|(?!\w))"
    r"|(?P<class>[A-Z]\w+(?:\.[a-z_]+)?)(?![\w.]*, line |\w)"
    r"|(?P<call>[a-z_]+)\(\)"
    r"|^(?P<subject>(?:[a-z_]+\.)?[a-z_]+)(?=:| is empty| must )"
    r")"
)


class Verb(TyperCommand):
    """A command whose errors name what its user can type."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; an error of the library keeps its type."""
        try:
            return super().invoke(ctx)
        except CompressionError as error:
            options = {str(one.name): Option.of(one) for one in self.params}
            error.args = (reworded(str(error), str(self.name), options),)
            raise


@dataclass(frozen=True)
class Option:
    """What is typed for a parameter (`--data`, `MODEL`), and what its help calls the value (`DATA`).

    >>> Option("--data", "DATA").given(), Option("--size", "BYTES").given("'12 MB'"), Option("MODEL").given()
    ('--data DATA', "--size '12 MB'", 'MODEL')
    """

    typed: str
    value: str = ""

    @classmethod
    def of(cls, declared: Any) -> Option:
        """Read it off a parameter of a verb."""
        flags = [flag for flag in declared.opts if flag.startswith("--")]
        return cls(flags[0], declared.metavar or "") if flags else cls(declared.metavar or declared.name.upper())

    def given(self, value: str | None = None) -> str:
        """Tell how it is typed with a value."""
        return f"{self.typed} {value or self.value}".strip()


def reworded(message: str, verb: str, options: Mapping[str, Option]) -> str:
    """Return a message of the library with the options of `verb` for arguments, and registered names for classes.

    >>> options = {"data": Option("--data", "DATA"), "size": Option("--size", "BYTES")}
    >>> reworded("GPTQ needs data; pass data=[...], for instance 128 texts.", "fit", options)
    'gptq needs data; pass --data DATA, for instance 128 texts.'
    >>> reworded("fit.size must be a quantity, got 'data=[]'; pass size='12 MB'.", "fit", options)
    "--size must be a quantity, got 'data=[]'; pass --size '12 MB'."
    >>> reworded("TextClassification.data[0] has no label.", "fit", options)
    'row 1 of --data has no label.'
    >>> reworded("data is not empty and not a checkpoint; choose another folder.", "fit", options)
    'data is not empty and not a checkpoint; choose another folder.'
    """

    def word(found: re.Match[str]) -> str:
        if found["call"]:
            return verb if found["call"] == verb else found[0]
        option = _option(found["rows"] or found["keyword"] or found["class"] or found["subject"], verb, options)
        if option is None:
            return found[0]
        if found["rows"]:
            column = f"{found['column']} of " if found["column"] else ""
            return f"{column}row {int(found['index']) + 1} of {option.typed}"
        return option.given(found["value"]) if found["keyword"] else option.typed

    return _PYTHON.sub(word, message)


def _option(name: str, verb: str, options: Mapping[str, Option]) -> Option | None:
    """Return what is typed for `data`, `fit.size`, `TextClassification.average`, `MaxDrop.metric`, `GPTQ.bits`."""
    owner, dot, field = name.partition(".")
    if not dot and name in options:
        return options[name]
    if owner == verb:
        return options.get(field)
    kind, registered = _registered(owner)
    if kind == "gate":
        return options.get(registered)
    if kind == "task" and field == "data":
        return options.get("task_data") or options.get("data")
    if kind == "task" and field and "settings" in options:
        return Option(f"{options['settings'].typed} {field}")
    return Option(f"{registered}{dot}{field}") if kind else None


def _registered(name: str) -> tuple[str, str]:
    """Return of a public class what it is, and its name in recipes and options; two empty texts if it has none."""
    import llmcompress

    from ..registry import compressors, gates, tasks

    cls: Any = getattr(llmcompress, name, None)
    for registry in (compressors, tasks, gates) if isinstance(cls, type) else ():
        try:
            return registry.kind, registry.name_of(cls)
        except UnknownNameError:
            continue
    return "", ""
