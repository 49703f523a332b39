"""Places on disk that cannot be written, told in one sentence, and before the work if need be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError


@contextmanager
def told_if_unwritable(place: str | Path, remedy: str = "make room, or choose another place") -> Iterator[None]:
    """Turn what the system says of a place that cannot be written into an error that names it, and the way out.

    Example:
        >>> with told_if_unwritable("out.json", "make room"):
        ...     raise OSError("no space left")
        Traceback (most recent call last):
        llmcompress.errors.CheckpointError: out.json cannot be written: no space left; make room.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{place} cannot be written: {error}; {remedy}.") from error


def check_place(place: str | Path) -> None:
    """Refuse a file that cannot be written, before the work whose outcome it is to hold. Nothing is left on the disk.

    Raises:
        CheckpointError: it is a folder, or nothing can be written where it is to be.

    Example:
        >>> check_place("/dev/null/out.json")
        Traceback (most recent call last):
        llmcompress.errors.CheckpointError: /dev/null/out.json cannot be written: ...
    """
    path = Path(place).absolute()
    with told_if_unwritable(place, "choose another place"):
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        with tempfile.TemporaryFile(dir=next(one for one in path.parents if one.exists())):
            pass
