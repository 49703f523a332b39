"""Remarks for plans and reports, put together."""

from __future__ import annotations


def joined(*remarks: str | None) -> str | None:
    """Return the remarks that there are as one, or None.

    Example:
        >>> joined("shared with wte", None, "its last group has 8 of 64 inputs")
        'shared with wte; its last group has 8 of 64 inputs'
    """
    return "; ".join(filter(None, remarks)) or None
