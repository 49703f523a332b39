"""What is asked of a sweep, checked before any work: the names of its chains, their steps, and its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..evaluation.evaluate import as_tasks
from ..inputs import check_seed
from ..pipeline import Pipeline, Step

if TYPE_CHECKING:
    from ..evaluation.tasks import Task

# Of a file's name most systems take 255 bytes, and a draft beside it needs some more than the name.
_MOST_BYTES = 200
_NEVER_IN_A_NAME = ("/", "\\", "\0")


def read_chains(chains: Any, recover: Step | None) -> dict[str, Pipeline]:
    """Return the chains by name, each with its recovery.

    Args:
        chains: by name: a step or several.
        recover: a distillation behind every step that changes weights, or None.

    Raises:
        ConfigError: there is no chain, one has no steps, or a name cannot be that of a folder of its own.

    Example:
        >>> read_chains({"../half": "magnitude_pruning"}, None)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: the name of a chain must be one that a folder can have: at most 200 bytes, not \
'.' or '..', without '/' and '\\'; got '../half': rename it.
    """
    if not isinstance(chains, Mapping) or not chains:
        raise ConfigError("sweep() must have at least one chain; pass {'int8': lc.DynamicQuantization()}.")
    names: dict[str, Any] = {}
    for given in chains:
        name = str(given)
        if not _is_folder_name(name):
            shown = name if len(name) <= _MOST_BYTES else f"{name[:40]}..."
            raise ConfigError(
                f"the name of a chain must be one that a folder can have: at most {_MOST_BYTES} bytes, not '.' or "
                f"'..', without '/' and '\\'; got {shown!r}: rename it."
            )
        # Some file systems do not tell capitals from small letters.
        if name.casefold() in names:
            raise ConfigError(
                f"every chain must have a name of its own, capitals or not, got {names[name.casefold()]!r} and "
                f"{given!r}: rename one of them."
            )
        names[name.casefold()] = given
    read = {str(name): Pipeline(steps=steps, recover=recover) for name, steps in chains.items()}
    for name, chain in read.items():
        if not chain.flatten():
            raise ConfigError(f"chain {name!r} must have at least one step, got none; pass [lc.DynamicQuantization()].")
    return read


def check_settings(*, workers: int, on: str, threads: int | None, seed: int, folder: Any) -> None:
    """Refuse settings that are of another kind, or out of range.

    Raises:
        ConfigError: naming the setting.
    """
    if not _is_count(workers):
        raise ConfigError(f"workers must be an integer of at least 1, got {workers!r}.")
    if threads is not None and not _is_count(threads):
        raise ConfigError(f"threads must be an integer of at least 1, or None, got {threads!r}.")
    check_seed(seed)
    if folder is not None and not isinstance(folder, (str, Path)):
        raise ConfigError(f"folder must be a path or None, got {folder!r}; pass folder='sweep'.")
    if folder is not None and (Path(folder) / "config.json").is_file():
        raise ConfigError(
            f"folder must be one for stages and models, got {str(folder)!r}, which is a model's own; pass "
            f"folder='sweep'."
        )
    if on not in ("processes", "ray"):
        raise ConfigError(f"on must be 'processes' or 'ray', got {on!r}.")


def read_tasks(task: Task | Sequence[Task]) -> tuple[Task, ...]:
    """Return one task or several as a tuple.

    Raises:
        ConfigError: something else than a task was passed.
        MissingInputError: there is none.
    """
    # A text is a sequence too, of letters.
    return as_tasks((task,) if isinstance(task, str) else task)


def _is_folder_name(name: str) -> bool:
    size = len(name.encode("utf-8", errors="surrogatepass"))
    return (
        0 < size <= _MOST_BYTES
        and name.strip() not in ("", ".", "..")
        and not any(character in name for character in _NEVER_IN_A_NAME)
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 1
