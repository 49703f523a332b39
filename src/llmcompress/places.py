"""Places on disk that cannot be written, told in one sentence."""

from __future__ import annotations

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
