"""A model folder on disk: where its tensors are, from the headers of its safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..tensor_files import Stored, stored_in

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Folder:
    """A model folder: where its config and its tensors are.

    Attributes:
        path: the folder.
        files: its safetensors files, in order.
        stored: every tensor by its name on disk.
    """

    path: Path
    files: tuple[Path, ...]
    stored: Mapping[str, Stored]


def open_folder(path: str | Path) -> Folder:
    """Find the tensors of a folder, in one safetensors file or in shards with an index.

    Raises:
        CheckpointError: it is no model folder, or a file is missing or damaged.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path} must be a folder with config.json and safetensors files; save the model there.")
    if (path / _INDEX).is_file():
        try:
            names = sorted(set(json.loads((path / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{path / _INDEX} is damaged ({error!r}); download or save it again.") from error
    else:
        names = [_SINGLE]
    files = tuple(path / name for name in names)
    for file in files:
        if not file.is_file():
            other = next(iter(sorted(path.glob("*.bin"))), None)
            raise CheckpointError(
                f"{path} has no {file.name}"
                + (f", but {other.name}; only safetensors are read: save the model again." if other else ".")
            )
    return Folder(path, files, {name: stored for file in files for name, stored in stored_in(file).items()})
