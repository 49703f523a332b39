"""Which of several processes this one is, where `accelerate launch`, `torchrun` or their like started it."""

from __future__ import annotations

import os


def launched() -> bool:
    """Tell whether this process is one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def writes() -> bool:
    """Tell whether it is for this process to write what all of them have: the first does, and one that is alone."""
    return os.environ.get("RANK", "0") == "0"
