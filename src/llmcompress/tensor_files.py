"""Tensors in safetensors files, seen through a map or read into memory, and JSON: written whole or not at all."""

from __future__ import annotations

import ctypes
import hashlib
import json
import mmap
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .anatomy.saved import DTYPE_NAMES
from .errors import CheckpointError
from .places import told_if_unwritable

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES}
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_OWN_PAGES = 1 << 16  # from so many bytes on a tensor has pages of its own
_LONGEST_HEADER = 100 << 20  # what the format allows


def weight_files(folder: Path) -> tuple[Path, ...]:
    """Return the safetensors files of a model folder that `from_pretrained` reads: one, or the shards of an index.

    Others may lie beside them: an adapter, a shard of an earlier save, the same weights in another layout. Whether the
    files are there is not looked at.

    Raises:
        CheckpointError: the index is damaged.
    """
    index = folder / _INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return (folder / _SINGLE,)
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged ({error!r}); download or save it again.") from error
    odd = next((name for name in names if not isinstance(name, str) or name != Path(name).name), None)
    if odd is not None:
        raise CheckpointError(f"{index} must name files of its folder, got {odd!r}; download or save it again.")
    return tuple(folder / name for name in names)


@dataclass(frozen=True)
class Stored:
    """One tensor in a file.

    Attributes:
        file: the safetensors file.
        start: where its bytes begin in the file.
        shape: its shape.
        dtype: its dtype.
    """

    file: Path
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """How many bytes it has."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self) -> tuple[torch.Tensor, mmap.mmap]:
        """Return the tensor as a view of the file, and the map that it lies in; it takes memory when it is read.

        What is written to the view stays in this process, and never reaches the file.
        """
        inside = self.start % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as file:
            mapping = mmap.mmap(
                file.fileno(), inside + self.nbytes, access=mmap.ACCESS_COPY, offset=self.start - inside
            )
        count = torch.Size(self.shape).numel()
        return torch.frombuffer(mapping, dtype=self.dtype, count=count, offset=inside).view(self.shape), mapping

    def read(self) -> torch.Tensor:
        """Return the tensor in memory of its own, laid out as any other tensor: products come out the same to the bit.

        Raises:
            CheckpointError: the file has become shorter than its header says.
        """
        tensor = _memory(self.shape, self.dtype)
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.start)
            into = memoryview(tensor.flatten().view(torch.uint8).numpy()) if self.nbytes else memoryview(bytearray())
            read = 0
            while read < self.nbytes:
                got = file.readinto(into[read:])
                if not got:
                    raise CheckpointError(f"{self.file} ends early: it was cut or changed while it was in use.")
                read += got
        return tensor


def _memory(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor whose memory goes back to the system as soon as it is dropped.

    The C library keeps what is freed of sizes like those of weights, in pieces that fit nothing: block after block that
    comes and goes, a process grew by the whole model.
    """
    count = torch.Size(shape).numel()
    if count * dtype.itemsize < _OWN_PAGES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(shape, dtype=dtype)
    pages = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype, count=count).view(shape)


def trim_heap() -> None:
    """Give back to the system what the C library keeps of freed memory, where it has a call for that (glibc).

    The weights of new modules lie on its heap; without this a process grew by every block that it had made.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def stored_in(file: Path) -> dict[str, Stored]:
    """Return what a safetensors file holds, by name, from its header alone.

    Raises:
        CheckpointError: it is no whole safetensors file, or holds a dtype that torch does not know.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{file} is no safetensors file, or was cut; download or save it again.")
        try:
            header = json.loads(opened.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file} has no valid safetensors header ({error}); save it again.") from error
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise CheckpointError(f"{file}: {name} has the dtype {entry['dtype']}, which torch does not know.")
        begin, end = entry["data_offsets"]
        found[name] = stored = Stored(file, 8 + length + begin, tuple(entry["shape"]), dtype)
        if stored.nbytes != end - begin or stored.start + stored.nbytes > size:
            raise CheckpointError(f"{file}: {name} does not have the bytes that its header tells; save it again.")
    return found


def write_tensors(tensors: Mapping[str, torch.Tensor], file: Path) -> None:
    """Write a safetensors file; it is there whole or not at all, whenever the process or the machine stops.

    Raises:
        CheckpointError: it cannot be written (a full disk); nothing is left of it then.
    """
    draft = file.with_name(f"{file.name}.draft")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"})
        _settle(draft, file)
    except Exception as error:
        draft.unlink(missing_ok=True)
        # safetensors has an error of its own for a write that fails.
        raise CheckpointError(f"{file} cannot be written: {error}; make room, and call again to continue.") from error


def write_json(content: object, file: Path) -> None:
    """Write a JSON file; it is there whole or not at all.

    Raises:
        CheckpointError: it cannot be written.
    """
    draft = file.with_name(f"{file.name}.draft")
    with told_if_unwritable(file, "make room, and call again to continue"):
        try:
            draft.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            _settle(draft, file)
        except OSError:
            draft.unlink(missing_ok=True)
            raise


def mark_used(file: Path) -> None:
    """Note that a file is in use, for `remove_stages`; a folder that may only be read needs no such note."""
    with suppress(OSError):
        os.utime(file)


def write_sealed(content: Mapping[str, Any], file: Path) -> None:
    """Write a JSON file with a hash of its content, which `read_sealed` checks; see `write_json`."""
    write_json({**content, "sha256": _hash_of(content)}, file)


def read_sealed(file: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        CheckpointError: it is damaged, or another file.
        FileNotFoundError: there is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        known = found.pop("sha256")
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        told = f"{type(error).__name__}: {error}"  # not its repr: that of a decoding error holds the whole file
        raise CheckpointError(f"{file} is damaged ({told}); delete it to have it made again.") from error
    if known != _hash_of(found):
        raise CheckpointError(f"{file} is damaged: its content is not what was written; delete it.")
    return dict(found)


def _hash_of(content: Mapping[str, Any]) -> str:
    plain = json.loads(json.dumps(content))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def sync(path: Path) -> None:
    """Have the disk hold what was written to a file, or which files a folder has, before anything that comes later."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    opened = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _settle(draft: Path, file: Path) -> None:
    sync(draft)
    os.replace(draft, file)
