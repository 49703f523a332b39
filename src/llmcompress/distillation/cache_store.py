"""Arrays on disk that are written row by row, in any order, and read while they are mapped into memory.

A folder holds `about.json`, one raw file an array, and `done.bin`, one byte a row. It is filled under another name and
renamed when the last row is there; what was killed goes on where it stopped, since a row is marked behind its numbers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BusyError, CheckpointError
from ..locks import locked

_ABOUT, _DONE = "about.json", "done.bin"
_SECONDS_A_DAY = 86_400
_NAME = re.compile(r"[0-9a-f]{24}(\.partial)?")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Array:
    """What one file holds.

    Attributes:
        dtype: `"float16"`, `"bfloat16"`, `"float32"`, `"uint16"` or `"int32"`.
        width: numbers an entry.
        entries: how many of all rows.
    """

    dtype: str
    width: int
    entries: int

    @property
    def stored(self) -> np.dtype[Any]:
        """The dtype in which numpy holds it, which knows no bfloat16."""
        return np.dtype("uint16" if self.dtype == "bfloat16" else self.dtype)

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return self.entries * self.width * self.stored.itemsize


class Store:
    """The arrays of one folder.

    Args:
        folder: where they are.
        arrays: by name.
        rows: how many.
        writing: whether they may be changed.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Array], rows: int, *, writing: bool) -> None:
        self.arrays = dict(arrays)
        mode: Any = "r+" if writing else "r"
        self._maps = {
            name: np.memmap(folder / f"{name}.bin", array.stored, mode, shape=(array.entries, array.width))
            for name, array in arrays.items()
            if array.nbytes
        }
        self.done = np.memmap(folder / _DONE, np.uint8, mode, shape=(rows,))

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Write the entries from `start` on; values (entries, width), or what has as many numbers."""
        array = self.arrays[name]
        if array.nbytes:
            flat = _to_numpy(values, array).reshape(-1, array.width)
            self._maps[name][start : start + len(flat)] = flat

    def read(self, name: str, spans: Iterable[tuple[int, int]]) -> torch.Tensor:
        """Return the entries of all spans (start, end), one behind the other: (entries, width)."""
        array = self.arrays[name]
        parts = [self._maps[name][start:end] for start, end in spans if end > start]
        found = np.concatenate(parts) if parts else np.zeros((0, array.width), array.stored)
        if array.dtype == "bfloat16":
            return torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(found.astype(np.int64) if array.dtype in ("uint16", "int32") else found)

    def flush(self) -> None:
        """Have the disk hold the numbers, and then the marks."""
        for file in self._maps.values():
            file.flush()
        self.done.flush()


def begin(folder: Path, arrays: Mapping[str, Array], rows: int, about: Mapping[str, Any]) -> Store:
    """Open a folder for writing: what an earlier run left of it, or a new one.

    Raises:
        CheckpointError: the disk has no room for it.
    """
    told = _told(arrays, rows, about)
    if not (folder / _ABOUT).is_file() or _read(folder) != told:
        if folder.exists():
            shutil.rmtree(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        needed, free = sum(array.nbytes for array in arrays.values()), shutil.disk_usage(folder.parent).free
        if needed > free:
            raise CheckpointError(
                f"TeacherCache.folder must have room for {needed / 1e9:.3g} GB, got {free / 1e9:.3g} GB in "
                f"{folder.parent}; take another disk, fewer hidden states or a lower top_k."
            )
        folder.mkdir()
        for name, array in arrays.items():
            with (folder / f"{name}.bin").open("wb") as file:
                file.truncate(array.nbytes)
        with (folder / _DONE).open("wb") as file:
            file.truncate(rows)
        (folder / _ABOUT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
    return Store(folder, arrays, rows, writing=True)


def finish(draft: Path, folder: Path) -> None:
    """Give a folder in which all rows are its name."""
    os.replace(draft, folder)


def open_finished(folder: Path, rows: int) -> Store:
    """Open a folder for reading.

    Raises:
        CheckpointError: it is damaged.
    """
    told = _read(folder)
    try:
        arrays = {name: Array(**fields) for name, fields in told["arrays"].items()}
        sizes = {f"{name}.bin": array.nbytes for name, array in arrays.items()} | {_DONE: rows}
        wrong = [name for name, size in sizes.items() if (folder / name).stat().st_size != size]
        whole = told["format_version"] == FORMAT_VERSION and told["rows"] == rows and not wrong
    except (KeyError, TypeError, OSError):
        whole = False
    store = Store(folder, arrays, rows, writing=False) if whole else None
    if store is None or not bool(store.done.all()):
        raise CheckpointError(f"{folder} is a damaged cache of a teacher's answers; delete it, and it is made again.")
    with suppress(OSError):  # readers need not be allowed to write
        os.utime(folder / _ABOUT)
    return store


def remove(folder: Path, *, unused_days: float) -> list[Path]:
    """Delete the stores in `folder` that nothing was read from or written to for so many days, and return them.

    One that is being written is left alone, and so is whatever is no store: the folder may hold other things.
    """
    oldest, gone = time.time() - unused_days * _SECONDS_A_DAY, []
    for about in sorted(folder.glob(f"*/{_ABOUT}")):
        store = about.parent
        if not _is_store(store) or (unused_days and about.stat().st_mtime > oldest):
            continue
        with suppress(BusyError), locked(lock_of(store), "in use"):
            shutil.rmtree(store)
            gone.append(store)
    return gone


def lock_of(folder: Path) -> Path:
    """Return what is locked while a store, finished or not, is written."""
    return folder.with_suffix(".lock")


def _is_store(folder: Path) -> bool:
    """Tell whether a folder has the name and the files of a store, finished or not, and nothing else in it."""
    told = _read(folder)
    if folder.is_symlink() or not _NAME.fullmatch(folder.name) or not {"format_version", "rows"} <= set(told):
        return False
    arrays = told.get("arrays")
    files = {f"{name}.bin" for name in arrays} if isinstance(arrays, dict) else set()
    here = {path.name for path in folder.iterdir()}
    return bool(files) and _DONE in here and here <= {_ABOUT, _DONE, *files}


def _told(arrays: Mapping[str, Array], rows: int, about: Mapping[str, Any]) -> dict[str, Any]:
    files = {name: asdict(array) for name, array in arrays.items()}
    told: dict[str, Any] = json.loads(json.dumps({**about, "arrays": files, "rows": rows}))
    return {"format_version": FORMAT_VERSION, **told}


def _read(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _to_numpy(values: torch.Tensor, array: Array) -> np.ndarray[Any, Any]:
    values = values.detach().cpu()
    if array.dtype == "bfloat16":
        return values.to(torch.bfloat16).contiguous().view(torch.int16).numpy().view(np.uint16)
    if array.dtype == "float16":
        # What half precision cannot hold is its largest number, not infinity.
        limit = torch.finfo(torch.float16).max
        return values.float().clamp(-limit, limit).to(torch.float16).numpy()
    if values.is_floating_point():
        values = values.float()  # numpy knows no bfloat16, in which a teacher may have answered
    return values.numpy().astype(array.stored)
