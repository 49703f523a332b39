"""From the times of parts to those of chains: what a pass takes, learned from the chains that were measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

# What the survey's word weighs beside one measured chain: how far all else than the blocks may be from it, how far the
# blocks, and how far one shape from the others. A part that is timed alone finds its numbers near, as in no model.
_REST, _BLOCKS, _SHAPE = 0.01, 0.01, 0.25
# No part takes less than this share of what was surveyed.
_LEAST = 0.1


@dataclass(frozen=True)
class Timed:
    """A chain that was measured.

    Attributes:
        scheme: number of its scheme of bits.
        shape: number of its shape.
        rest: what the survey says of all that is in no block, in milliseconds.
        blocks: what it says of the blocks that stay.
        measured: what a pass took.
    """

    scheme: int
    shape: int
    rest: float
    blocks: float
    measured: float


class Times:
    """What is learned of times: for each scheme a factor on all that is in no block, and one on the blocks of a shape.

    Least squares, relative to what was measured, with a ridge towards 1: two chains of one depth tell how their shapes
    differ, and two of different depths what a block takes, and what is left.

    Example:
        >>> times = Times()
        >>> for count, measured in ((2, 3.0), (4, 5.0)):  # the survey says 1 + count
        ...     times.learn(Timed(scheme=0, shape=0, rest=1.0, blocks=count, measured=measured))
        >>> print(f"{times.rest(0) + 3 * times.blocks(0, 0):.1f} {times.rest(0) + 2 * times.blocks(0, 0):.1f}")
        4.0 3.0
    """

    def __init__(self) -> None:
        self._seen: list[Timed] = []
        self._rest: dict[int, float] = {}
        self._common: dict[int, float] = {}
        self._own: dict[tuple[int, int], float] = {}

    def learn(self, timed: Timed) -> None:
        """Take a measured chain into account."""
        self._seen.append(timed)
        seen = [one for one in self._seen if one.scheme == timed.scheme]
        shapes = sorted({one.shape for one in seen})
        rows, wanted = [], []
        for one in seen:
            own = [one.blocks * (one.shape == shape) for shape in shapes]
            rows.append(np.array([one.rest, one.blocks, *own]) / one.measured)
            wanted.append(1.0)
        # The unknowns: of the rest, of all blocks, and what each shape has beyond that.
        ridge = np.sqrt([_REST, _BLOCKS, *[_SHAPE] * len(shapes)])
        target = np.array([1.0, 1.0, *[0.0] * len(shapes)])
        low = [_LEAST, _LEAST, *[-np.inf] * len(shapes)]
        found = lsq_linear(np.vstack([*rows, np.diag(ridge)]), np.array([*wanted, *ridge * target]), (low, np.inf)).x
        self._rest[timed.scheme], self._common[timed.scheme] = float(found[0]), float(found[1])
        self._own.update(
            {(timed.scheme, shape): float(beyond) for shape, beyond in zip(shapes, found[2:], strict=True)}
        )

    def rest(self, scheme: int) -> float:
        """Return how many times as long as surveyed all takes that is in no block."""
        return self._rest.get(scheme, 1.0)

    def blocks(self, scheme: int, shape: int) -> float:
        """Return how many times as long as surveyed the blocks take; a shape not measured is like the others."""
        return max(self._common.get(scheme, 1.0) + self._own.get((scheme, shape), 0.0), _LEAST)
