"""The time that a search may take, what of it is left, and the bar that shows it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm


def now() -> float:
    """Return seconds of a clock that never goes back."""
    return time.monotonic()


class Budget:
    """A clock that runs from when it is made.

    Args:
        seconds: how long everything may take.
        progress: whether to show a bar.

    Attributes:
        stages: what was done, in order, and the seconds that it took.

    Example:
        >>> budget = Budget(600.0, progress=False)
        >>> with budget.stage("short runs"):
        ...     599 < budget.left() <= 600
        True
    """

    def __init__(self, seconds: float, *, progress: bool) -> None:
        self.seconds = seconds
        self.stages: list[tuple[str, float]] = []
        self._begin = now()
        layout = "{percentage:3.0f}%|{bar}| {desc}"
        self._bar = tqdm(total=seconds, desc="fit", disable=not progress, bar_format=layout, leave=False)

    def spent(self) -> float:
        """Return the seconds that are gone."""
        return now() - self._begin

    def left(self) -> float:
        """Return the seconds that are left; below 0 where it is overdrawn."""
        return self.seconds - self.spent()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show what is being done and how much time is left, as long as this is open."""
        self._show(name)
        begin = self.spent()
        try:
            yield
        finally:
            self.stages.append((name, self.spent() - begin))
            self._show(name)

    def tell(self, line: str) -> None:
        """Write a line above the bar, where one is shown."""
        if not self._bar.disable:
            self._bar.write(f"fit: {line}", file=sys.stderr)

    def close(self) -> None:
        """Take the bar away."""
        self._bar.close()

    def _show(self, name: str) -> None:
        minutes, seconds = divmod(max(round(self.left()), 0), 60)
        self._bar.set_description_str(f"fit: {name}, {minutes}:{seconds:02d} left", refresh=False)
        self._bar.update(min(self.spent(), self.seconds) - self._bar.n)
        self._bar.refresh()
