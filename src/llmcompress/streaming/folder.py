"""A model folder on disk: where its tensors are, from the headers of its safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError
from ..tensor_files import Stored, stored_in, weight_files


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
    files = weight_files(path)
    for file in files:
        if not file.is_file():
            other = next(iter(sorted(path.glob("*.bin"))), None)
            raise CheckpointError(
                f"{path} has no {file.name}"
                + (f", but {other.name}; only safetensors are read: save the model again." if other else ".")
            )
    return Folder(path, files, {name: stored for file in files for name, stored in stored_in(file).items()})
