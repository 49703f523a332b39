"""Which blocks stay, how wide, in which bits and with which vocabulary: the least damage within what is allowed.

A mixed-integer linear program (HiGHS, by `scipy.optimize.milp`). Damages of parts add up, and so do bytes and times;
that n blocks together do more harm than each of them alone is a term of its own.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import lil_array

Cost = Literal["bytes", "ms"]

_GAP = 1e-4
_SECONDS = 20.0
# In less time than this the solver may have found nothing, though there is something.
_LEAST_SECONDS = 2.0


@dataclass(frozen=True)
class BlockWay:
    """One way for a block to stay.

    Attributes:
        shape: number of the widths; the same for all blocks of a chain.
        scheme: number of the scheme of bits; the same for all blocks of a chain.
        bits: of its weights, within the scheme.
        damage: what it costs in quality.
        bytes: on disk.
        ms: of a pass through it.
    """

    shape: int
    scheme: int
    bits: int
    damage: float
    bytes: float
    ms: float


@dataclass(frozen=True)
class RestWay:
    """One way for all that is in no block: embeddings, head.

    Attributes:
        vocabulary: number of the vocabulary.
        scheme: number of the scheme of bits.
        bits: of its weights, within the scheme.
        damage: what it costs in quality.
        bytes: on disk.
        ms: of a pass through it.
    """

    vocabulary: int
    scheme: int
    bits: int
    damage: float
    bytes: float
    ms: float


@dataclass(frozen=True)
class Problem:
    """All that can be chosen.

    Attributes:
        blocks: for each block of the model the ways in which it may stay.
        drops: for each block the damage of leaving it out.
        together: for each number of blocks left out, what that does beyond the sum of `drops`; index 0 is none.
        stacks: the blocks of each stack by number; of each one at least one stays.
        rests: the ways for all else.
        fixed: numbers of the blocks that must stay.
        tapers: whether no stack may keep more blocks than the one before it.
    """

    blocks: Sequence[Sequence[BlockWay]]
    drops: Sequence[float]
    together: Sequence[float]
    stacks: Sequence[Sequence[int]]
    rests: Sequence[RestWay]
    fixed: Collection[int] = ()
    tapers: bool = False

    @property
    def unchanged(self) -> Skeleton:
        """The choice that leaves the model as it is; the first shape, scheme and vocabulary are the model's own."""
        return Skeleton(len(self.blocks), 0, 0, vocabulary=0)


@dataclass(frozen=True)
class Skeleton:
    """What makes chains different: how many blocks stay, how wide, in which scheme; with any vocabulary, or one."""

    blocks: int
    shape: int
    scheme: int
    vocabulary: int | None = None


@dataclass(frozen=True)
class Solution:
    """A choice.

    Attributes:
        kept: number of each block that stays, with its way.
        rest: the way of all else.
        damage: predicted, in all.
        bytes: on disk.
        ms: of a pass.
    """

    kept: Mapping[int, BlockWay]
    rest: RestWay
    damage: float
    bytes: float
    ms: float

    @property
    def skeleton(self) -> Skeleton:
        """What it differs by from others."""
        way = next(iter(self.kept.values()))
        return Skeleton(len(self.kept), way.shape, way.scheme)


def solve(
    problem: Problem,
    limits: Mapping[Cost, float],
    *,
    minimise: Literal["damage"] | Cost = "damage",
    excluded: Collection[Skeleton] = (),
    vocabulary: int | None = None,
    seconds: float = _SECONDS,
) -> Solution | None:
    """Return the best choice within `limits`, or None where there is none.

    Args:
        problem: what can be chosen.
        limits: the most bytes, and the most milliseconds.
        minimise: what is to be least.
        excluded: skeletons that must not come out.
        vocabulary: the only vocabulary that may be taken; None allows all.
        seconds: how long the solver looks for a better one, about.

    Example:
        >>> ways = [BlockWay(0, 0, 32, 0.0, 10, 1.0), BlockWay(1, 0, 32, 0.2, 5, 0.5)]
        >>> both = Problem([ways, ways], [0.5, 0.1], [0.0, 0.0, 9.9], [(0, 1)], [RestWay(0, 0, 32, 0.0, 2, 0.0)])
        >>> found = solve(both, {"bytes": 12.5})
        >>> sorted(found.kept), found.damage
        ([0], 0.1)
    """
    program = _Program(problem)
    program.structure(vocabulary)
    for skeleton in excluded:
        program.exclude(skeleton)
    for cost, limit in limits.items():
        program.at_most(cost, limit)
    taken = program.run(minimise, min(max(seconds, _LEAST_SECONDS), _SECONDS))
    if taken is None:
        return None
    kept = {block: way for (block, way), value in zip(program.ways, taken, strict=False) if value > 0.5}
    rest = next(rest for rest, value in zip(problem.rests, taken[program.rests :], strict=False) if value > 0.5)
    return Solution(
        kept,
        rest,
        damage=_damage(problem, kept, rest),
        bytes=sum(way.bytes for way in kept.values()) + rest.bytes,
        ms=sum(way.ms for way in kept.values()) + rest.ms,
    )


def _damage(problem: Problem, kept: Mapping[int, BlockWay], rest: RestWay) -> float:
    gone = [block for block in range(len(problem.blocks)) if block not in kept]
    return (
        sum(way.damage for way in kept.values())
        + sum(problem.drops[block] for block in gone)
        + problem.together[len(gone)]
        + rest.damage
    )


class _Program:
    """The variables in a row: ways of blocks, ways of the rest, how many blocks go, shapes, schemes; all 0 or 1."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.ways = [(block, way) for block, own in enumerate(problem.blocks) for way in own]
        self.rests = len(self.ways)
        self.counts = self.rests + len(problem.rests)
        self.shapes = self.counts + len(problem.together)
        shapes = 1 + max(way.shape for _, way in self.ways)
        self.schemes = self.shapes + shapes
        self._size = self.schemes + 1 + max(way.scheme for _, way in self.ways)
        self._rows: list[tuple[dict[int, float], float, float]] = []

    def structure(self, vocabulary: int | None) -> None:
        """Each block stays in one way or goes, one way for the rest, one shape, one scheme."""
        problem, of = self._problem, len(self._problem.blocks)
        by_block: dict[int, list[int]] = {}
        for index, (block, _) in enumerate(self.ways):
            by_block.setdefault(block, []).append(index)
        for block, own in by_block.items():
            self._row(own, int(block in problem.fixed), 1)
        for stack in problem.stacks:
            self._row([index for block in stack for index in by_block[block]], 1, np.inf)
        for earlier, later in itertools.pairwise(problem.stacks) if problem.tapers else ():
            more, fewer = (
                dict.fromkeys((index for block in stack for index in by_block[block]), sign)
                for stack, sign in ((earlier, 1.0), (later, -1.0))
            )
            self._rows.append(({**more, **fewer}, 0, np.inf))
        self._row(range(self.rests, self.counts), 1, 1)
        self._row(range(self.counts, self.shapes), 1, 1)
        self._row(range(self.shapes, self.schemes), 1, 1)
        self._row(range(self.schemes, self._size), 1, 1)
        kept = dict.fromkeys(range(self.rests), 1.0)
        self._rows.append(
            ({**kept, **{self.counts + gone: float(gone) for gone in range(len(problem.together))}}, of, of)
        )
        for place, first, last in (("shape", self.shapes, self.schemes), ("scheme", self.schemes, self._size)):
            for number in range(last - first):
                taken = {index: 1.0 for index, (_, way) in enumerate(self.ways) if getattr(way, place) == number}
                self._rows.append(({**taken, first + number: -float(of)}, -np.inf, 0))
        for number in range(self._size - self.schemes):
            chosen = {self.rests + i: 1.0 for i, rest in enumerate(problem.rests) if rest.scheme == number}
            self._rows.append(({**chosen, self.schemes + number: -1.0}, 0, 0))
        if vocabulary is not None:
            others = [self.rests + i for i, rest in enumerate(problem.rests) if rest.vocabulary != vocabulary]
            self._row(others, 0, 0)

    def exclude(self, skeleton: Skeleton) -> None:
        """Forbid one combination of depth, shape and scheme, and of a vocabulary if it names one."""
        gone = len(self._problem.blocks) - skeleton.blocks
        taken = [self.counts + gone, self.shapes + skeleton.shape, self.schemes + skeleton.scheme]
        if skeleton.vocabulary is None:
            self._row(taken, 0, 2)
        else:
            rests = enumerate(self._problem.rests, self.rests)
            self._row([*taken, *(at for at, rest in rests if rest.vocabulary == skeleton.vocabulary)], 0, 3)

    def at_most(self, cost: Cost, limit: float) -> None:
        """Limit what it costs."""
        costs = self._costs(cost)
        # The solver's tolerances are absolute: numbers are brought near 1.
        self._rows.append(({index: value / limit for index, value in costs.items()}, -np.inf, 1.0))

    def run(self, minimise: Literal["damage"] | Cost, seconds: float) -> np.ndarray | None:
        """Solve it."""
        objective = np.zeros(self._size)
        for index, value in (self._damages() if minimise == "damage" else self._costs(minimise)).items():
            objective[index] = value
        rows = lil_array((len(self._rows), self._size))
        for number, (own, _, _) in enumerate(self._rows):
            for index, value in own.items():
                rows[number, index] = value
        lows, highs = ([row[side] for row in self._rows] for side in (1, 2))
        found = milp(
            objective / (np.abs(objective).max() or 1.0),
            constraints=LinearConstraint(rows.tocsr(), lows, highs),
            integrality=np.ones(self._size),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": _GAP, "time_limit": seconds},
        )
        return found.x

    def _row(self, indices: Collection[int] | range, low: float, high: float) -> None:
        if len(indices):
            self._rows.append((dict.fromkeys(indices, 1.0), low, high))

    def _costs(self, cost: Cost) -> dict[int, float]:
        costs = {index: getattr(way, cost) for index, (_, way) in enumerate(self.ways)}
        return {**costs, **{self.rests + i: getattr(rest, cost) for i, rest in enumerate(self._problem.rests)}}

    def _damages(self) -> dict[int, float]:
        # A block that stays takes the damage of leaving it out away from the sum of all.
        damages = {index: way.damage - self._problem.drops[block] for index, (block, way) in enumerate(self.ways)}
        damages.update({self.rests + i: rest.damage for i, rest in enumerate(self._problem.rests)})
        damages.update({self.counts + gone: value for gone, value in enumerate(self._problem.together)})
        return damages
