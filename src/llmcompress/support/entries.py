"""The finished entries of a matrix, one JSON line each: a run that was cut short continues behind them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import ConfigError
from ..result import library_versions
from .worker import Status


@dataclass(frozen=True)
class Entry:
    """One strategy on one architecture.

    Attributes:
        task: key of the task.
        architecture: the `model_type`.
        model: name of the model class.
        strategy: name of the strategy.
        status: what came out.
        note: the reason, or a remark.
        seconds: how long it took.
        versions: of the libraries; another version asks again.
    """

    task: str
    architecture: str
    model: str
    strategy: str
    status: Status
    note: str = ""
    seconds: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, str]:
        """What is asked for once: task, architecture and strategy."""
        return self.task, self.architecture, self.strategy


def versions() -> dict[str, str]:
    """Return the versions that an entry holds for."""
    return {name: number for name, number in library_versions().items() if name in _DECIDING}


_DECIDING = ("llmcompress", "transformers", "torch")
# Of each line: what is left of one that was cut in half begins so too, and the last line of another file does not.
_BEGINNING = '{"task": '


def read_entries(path: Path) -> dict[tuple[str, str, str], Entry]:
    """Return the entries of `path` that hold for the installed versions, by key; the last one of a key counts.

    A last line that was cut in half is left out; there is no other way to break a file that is only appended to.

    Raises:
        ConfigError: another line is no entry, or the last one is no beginning of one.
    """
    if not path.exists():
        return {}
    lines = path.read_text(encoding="utf-8", errors="backslashreplace").split("\n")
    found: dict[tuple[str, str, str], Entry] = {}
    now = versions()
    for number, line in enumerate(lines, start=1):
        cut = number == len(lines) and _BEGINNING.startswith(line[: len(_BEGINNING)])
        if cut or not line:
            continue  # what stands behind the last line break was not written to its end
        try:
            if number == len(lines):
                raise ValueError("nor the beginning of one")
            entry = Entry(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"{path} must hold one entry of the support matrix a line; line {number} is none ({error}). Choose "
                f"another file, or delete it."
            ) from error
        if entry.versions == now:
            found[entry.key] = entry
    return found


def append_entries(path: Path, entries: Iterable[Entry]) -> None:
    """Write entries behind those of `path`, after whatever is left of a line that was cut in half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        size = file.seek(0, 2)
        while size > 0:
            file.seek(size - 1)
            if file.read(1) == b"\n":
                break
            size -= 1
        file.truncate(size)
        file.write("".join(f"{json.dumps(asdict(entry))}\n" for entry in entries).encode())
