"""What became of a candidate that broke: told in one line, and nothing of it kept in memory."""

from __future__ import annotations

import traceback

from ..errors import CompressionError


def reason_of(error: Exception) -> str:
    """Say in one line what went wrong; of an error that the library did not raise on purpose, its class too.

    Example:
        >>> reason_of(CompressionError("no layer matches")), reason_of(RuntimeError("out of memory\\nTried to ..."))
        ('no layer matches', 'RuntimeError: out of memory')
    """
    said, _, _ = str(error).strip().partition("\n")
    if isinstance(error, CompressionError) and said:
        return said
    return f"{type(error).__name__}: {said}".removesuffix(": ")


def let_go(error: BaseException | None) -> None:
    """Empty the frames that an error and those before it came through: of a broken chain no model stays in memory."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
