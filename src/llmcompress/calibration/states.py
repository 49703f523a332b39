"""Outputs of blocks, kept in memory up to a budget and on disk past it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

# Of the memory that is free when the work begins.
_SHARE_OF_FREE = 0.25


@dataclass(frozen=True)
class _Kept:
    leaves: list[Any]  # tensors by their number in `tensors`, everything else as it is
    spec: TreeSpec
    tensors: list[torch.Tensor] | None  # None: in `file`
    file: Path | None
    device: torch.device
    size: int


@dataclass(frozen=True)
class _Number:
    value: int


class States:
    """What blocks put out, by key: tensors, or tuples and dicts of them.

    Args:
        memory_bytes: how much to keep in memory; None is a quarter of what is free now on the device of the tensors.

    A context manager: leaving it forgets everything and removes the files.
    """

    def __init__(self, memory_bytes: int | None) -> None:
        self._budget = memory_bytes
        self._kept: dict[Any, _Kept] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.bytes_in_memory = 0

    def __enter__(self) -> States:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def folder(self) -> Path | None:
        """Where the files are; None as long as everything is in memory."""
        return Path(self._folder.name) if self._folder is not None else None

    def __setitem__(self, key: Any, outputs: Any) -> None:
        """Keep a copy of `outputs`, in place of what was there."""
        self.drop(key)
        flat, spec = tree_flatten(outputs)
        leaves: list[Any] = []
        tensors: list[torch.Tensor] = []
        numbers: dict[int, _Number] = {}
        for leaf in flat:
            if isinstance(leaf, torch.Tensor):
                if id(leaf) not in numbers:
                    numbers[id(leaf)] = _Number(len(tensors))
                    # A copy: the model may go on to add to its hidden states in place.
                    tensors.append(leaf.detach().clone(memory_format=torch.contiguous_format))
                leaf = numbers[id(leaf)]
            leaves.append(leaf)
        size = sum(tensor.nbytes for tensor in tensors)
        device = tensors[0].device if tensors else torch.device("cpu")
        if self._budget is None:
            self._budget = int(_SHARE_OF_FREE * _free_bytes(device))
        if self.bytes_in_memory + size <= self._budget:
            self.bytes_in_memory += size
            self._kept[key] = _Kept(leaves, spec, tensors, None, device, size)
        else:
            file = self._new_file()
            save_file({str(number): tensor for number, tensor in enumerate(tensors)}, file)
            self._kept[key] = _Kept(leaves, spec, None, file, device, size)

    def __getitem__(self, key: Any) -> Any:
        kept = self._kept[key]
        tensors = kept.tensors
        if tensors is None:
            assert kept.file is not None
            read = load_file(kept.file, device=str(kept.device))
            tensors = [read[str(number)] for number in range(len(read))]
        leaves = [tensors[leaf.value] if isinstance(leaf, _Number) else leaf for leaf in kept.leaves]
        return tree_unflatten(leaves, kept.spec)

    def drop(self, key: Any) -> None:
        """Forget what was kept under `key`, if anything."""
        kept = self._kept.pop(key, None)
        if kept is None:
            return
        if kept.file is not None:
            kept.file.unlink()
        else:
            self.bytes_in_memory -= kept.size

    def _new_file(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="llmcompress-states-")
        self._files = getattr(self, "_files", 0) + 1
        return Path(self._folder.name) / f"{self._files}.safetensors"


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
