"""One process at a time: locks that the system takes back from a process however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import BusyError, CheckpointError


@contextmanager
def locked(file: Path, busy: str) -> Iterator[None]:
    """Hold the lock on `file`, which is made if absent and stays; a process that was killed holds none.

    Args:
        file: the lock.
        busy: what the error says.

    Raises:
        BusyError: somebody else holds it, another thread included.
        CheckpointError: there can be no lock.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder) / "lock"
        ...     with locked(file, "in use"), locked(file, "in use; wait for it"):
        ...         pass
        Traceback (most recent call last):
        llmcompress.errors.BusyError: in use; wait for it
    """
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise BusyError(busy) from None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be locked: {error}; make room, or choose another folder.") from error
    try:
        yield
    finally:
        lock.release()
