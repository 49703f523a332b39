"""What makes a run the same one: its input, its recipe, its data, its seed, the libraries; and who works on it now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..anatomy.digest import tokenizer_digest
from ..checkpoint import METADATA_FILE, fingerprint, read_metadata
from ..errors import CheckpointError
from ..locks import locked as one_at_a_time
from ..result import library_versions
from ..tensor_files import write_json
from .folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data import Example

_RUN_FILE = "run.json"
_LOCK = "lock"
_CONFIGS = ("config.json", "generation_config.json")
# What a message calls the parts of a run.
_PARTS = {
    "inputs": "another folder_in",
    "recipe": "other steps",
    "seed": "another seed",
    "data": "other data",
    "tokenizer": "another tokenizer",
    "versions": "other versions of the libraries",
}


def describe(
    folder: Folder,
    recipe: dict[str, Any],
    seed: int,
    data: Sequence[Example] | None,
    tokenizer: PreTrainedTokenizerBase | None,
    known: dict[str, Any],
) -> dict[str, Any]:
    """Return what a run is; two runs with equal descriptions end with equal bytes.

    Args:
        folder: the input; every file is hashed.
        recipe: of the steps.
        seed: of the run.
        data: of the run.
        tokenizer: of the run.
        known: what an earlier call returned: a file is not hashed again if it has the size and time it had then.

    Returns:
        JSON values.
    """
    earlier = known.get("inputs", {})
    files = [*folder.files, *(folder.path / name for name in _CONFIGS if (folder.path / name).is_file())]
    inputs = {}
    for file in files:
        status = file.stat()
        known_file = earlier.get(file.name, {})
        if (known_file.get("bytes"), known_file.get("modified")) == (status.st_size, status.st_mtime_ns):
            inputs[file.name] = known_file
        else:
            inputs[file.name] = {**fingerprint(file), "modified": status.st_mtime_ns}
    examples = json.dumps([asdict(example) for example in data]).encode() if data is not None else None
    return {
        "inputs": inputs,
        "recipe": recipe,
        "seed": seed,
        "data": hashlib.sha256(examples).hexdigest() if examples is not None else None,
        "tokenizer": tokenizer_digest(tokenizer) if tokenizer is not None else None,
        "versions": library_versions(),
    }


def identity(run: dict[str, Any]) -> dict[str, Any]:
    """Return a description without the times of the files, which copying changes."""
    inputs = {
        name: {key: value for key, value in entry.items() if key != "modified"} for name, entry in run["inputs"].items()
    }
    return {**run, "inputs": inputs}


def known_run(work: Path) -> dict[str, Any]:
    """Return the description of the run that was begun in `work`, or an empty dict.

    Raises:
        CheckpointError: it is damaged.
    """
    try:
        found: dict[str, Any] = json.loads((work / _RUN_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{work / _RUN_FILE} is damaged ({error}); delete {work} to begin anew.") from error
    return found


def refuse_foreign_work(work: Path) -> None:
    """Refuse a folder that no run began, and that would be deleted behind this one.

    Raises:
        CheckpointError: naming it.
    """
    if work.is_dir() and not (work / _RUN_FILE).is_file() and any(path.name != _LOCK for path in work.iterdir()):
        raise CheckpointError(
            f"{work} is where the unfinished run would be, and holds something else; move it away, or choose another "
            f"folder_out."
        )


def enter(work: Path, run: dict[str, Any]) -> None:
    """Begin a run in `work`, or go on with the one that was begun there.

    Raises:
        CheckpointError: that was another one.
    """
    known = known_run(work)
    if known:
        _refuse_other(known, run, f"{work} holds an unfinished run with", f"delete {work.name} to begin anew")
    if known != run:
        write_json(run, work / _RUN_FILE)


def is_done(out: Path, run: dict[str, Any]) -> bool:
    """Whether `out` holds the result of this very run.

    Raises:
        CheckpointError: it holds anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / METADATA_FILE).is_file():
        raise CheckpointError(f"folder_out must be a new or empty folder, got {str(out)!r}; choose another name.")
    known = read_metadata(out).get("run")
    if not isinstance(known, dict):
        raise CheckpointError(f"folder_out must be a new folder, and {out} holds another checkpoint; choose another.")
    _refuse_other(known, run, f"{out} holds the result of a run with", "choose another folder_out")
    return True


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Let one process at a time work in `work`; the lock is free again however the process ends.

    Raises:
        BusyError: another one works there.
    """
    with one_at_a_time(
        work / _LOCK, f"another process is at work in {work}; wait for it, or choose another folder_out."
    ):
        yield


def _refuse_other(known: dict[str, Any], run: dict[str, Any], holds: str, advice: str) -> None:
    ours, theirs = identity(run), identity({"inputs": {}, **known})
    for part, other in _PARTS.items():
        if ours[part] != theirs.get(part):
            raise CheckpointError(f"{holds} {other}; call with the same to continue, or {advice}.")
