"""From what was measured to what a chain is expected to lose: damages weighed by kind, calibrated by real outcomes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from scipy.optimize import nnls

from .solver import BlockWay, Problem, RestWay, Solution
from .space import Form, Shape, Space, Vocabulary
from .survey import Survey
from .times import Timed, Times

Kind = Literal["depth", "width", "int8", "packed8", "packed4", "vocabulary"]
Damages = dict[Kind, float]

PRIOR: dict[Kind, float] = {
    "depth": 0.1, "width": 0.1, "int8": 1.0, "packed8": 1.0, "packed4": 0.3, "vocabulary": 0.5,
}  # fmt: skip
"""Which share of a damage is left after recovery, before any outcome is known; only their ratios matter then."""

# How many outcomes the prior is worth.
_TRUST = 1.0
# More than any damage that is measured: nothing that cannot be computed is chosen.
_BROKEN = 1e3


class Predictor:
    """Says what a choice is expected to do, and makes the solver's problem of it.

    Args:
        space: what can be chosen.
        survey: what was measured of it.

    Attributes:
        weights: of each kind of damage, in units of the task's metric a nat once there are outcomes.
    """

    def __init__(self, space: Space, survey: Survey) -> None:
        self.space, self._survey = space, survey
        self.shapes = [one for one in space.shapes if one in survey.widths]
        self.vocabularies = [one for one in space.vocabularies if one in survey.vocabulary]
        self.forms = [one for one in space.forms if one in survey.rest_ms]
        self.weights = dict(PRIOR)
        self._times = Times()

    @property
    def complete(self) -> bool:
        """Whether all that can be chosen was looked at."""
        return not self._survey.skipped

    @property
    def base_ms(self) -> float:
        """What a pass of the model itself takes, in milliseconds."""
        own = self._survey.block_ms[self.space.shapes[0], self.space.forms[0]]
        return sum(own) + self._survey.rest_ms[self.space.forms[0]]

    def problem(self) -> Problem:
        """Return what can be chosen, in numbers."""
        found, weights = self._survey, self.weights
        blocks = []
        for number in range(len(self.space.blocks)):
            ways = [
                BlockWay(
                    shape,
                    form.number,
                    form.bits,
                    damage=weights["width"] * _finite(found.widths[own][number])
                    + weights[_kind(form)] * _finite(found.rounding[form][number]),
                    bytes=found.block_bytes[own, form][number],
                    ms=self._times.blocks(form.number, shape) * found.block_ms[own, form][number],
                )
                for shape, own in enumerate(self.shapes)
                for form in self.forms
                if (own, form) in found.block_ms
            ]
            blocks.append(ways)
        rests = [
            RestWay(
                index,
                form.number,
                form.bits,
                damage=weights["vocabulary"] * _finite(found.vocabulary[own])
                + weights[_kind(form)] * _finite(found.rest_rounding[form]),
                bytes=found.rest_bytes[own, form],
                ms=self._times.rest(form.number) * found.rest_ms[form],
            )
            for index, own in enumerate(self.vocabularies)
            for form in self.forms
        ]
        return Problem(
            blocks,
            drops=[weights["depth"] * _finite(value) for value in found.drops],
            together=[weights["depth"] * _finite(value) for value in found.together],
            stacks=self.space.stack_blocks,
            rests=rests,
            fixed=self.space.fixed,
            tapers=self.space.tapers,
        )

    def damages(self, solution: Solution) -> Damages:
        """Return what was measured of the parts of a choice, by kind, in nats, unweighted."""
        found = self._survey
        gone = [number for number in range(len(found.drops)) if number not in solution.kept]
        sums: Damages = dict.fromkeys(PRIOR, 0.0)
        sums["depth"] = sum(_finite(found.drops[number]) for number in gone) + _finite(found.together[len(gone)])
        for number, way in solution.kept.items():
            sums["width"] += _finite(found.widths[self.shapes[way.shape]][number])
            form = self.form(way)
            sums[_kind(form)] += _finite(found.rounding[form][number])
        sums["vocabulary"] = _finite(found.vocabulary[self.vocabularies[solution.rest.vocabulary]])
        form = self.form(solution.rest)
        sums[_kind(form)] += _finite(found.rest_rounding[form])
        return sums

    def expected(self, solution: Solution) -> float:
        """Return what a choice is expected to lose."""
        return sum(self.weights[kind] * value for kind, value in self.damages(solution).items())

    def shape(self, solution: Solution) -> Shape:
        """Return the widths of a choice."""
        return self.shapes[solution.skeleton.shape]

    def vocabulary(self, solution: Solution) -> Vocabulary:
        """Return the vocabulary of a choice."""
        return self.vocabularies[solution.rest.vocabulary]

    def form(self, way: BlockWay | RestWay) -> Form:
        """Return how the weights of a part are stored."""
        return next(form for form in self.forms if (form.number, form.bits) == (way.scheme, way.bits))

    def float_ms(self, solution: Solution) -> float:
        """Return what a pass takes where its weights are float, in milliseconds."""
        own = self._survey.block_ms[self.shape(solution), self.space.forms[0]]
        return sum(own[number] for number in solution.kept) + self._survey.rest_ms[self.space.forms[0]]

    def calibrate(self, outcomes: Sequence[tuple[Solution, float]]) -> None:
        """Weigh the kinds anew by what chains really lost: `outcomes` are choices with their drops."""
        self.weights = calibrated([(self.damages(choice), drop) for choice, drop in outcomes], PRIOR)

    def surveyed(self, solution: Solution) -> tuple[float, float]:
        """Return what the survey says of a choice: of all that is in no block, and of the blocks, in milliseconds."""
        found, shape = self._survey, self.shape(solution)
        blocks = sum(found.block_ms[shape, self.form(own)][number] for number, own in solution.kept.items())
        return found.rest_ms[self.form(solution.rest)], blocks

    def time_of(self, solution: Solution, measured: float) -> None:
        """Learn of times from what a chain really took, in milliseconds."""
        way = solution.skeleton
        self._times.learn(Timed(way.scheme, way.shape, *self.surveyed(solution), measured))


def calibrated(
    outcomes: Sequence[tuple[Mapping[Kind, float], float]], prior: Mapping[Kind, float]
) -> dict[Kind, float]:
    """Return weights, none below zero, by which damages come nearest to the losses that were seen.

    A ridge regression towards the prior, which is first brought to the scale of the outcomes: a few chains tell how
    large losses are, and only something of how the kinds differ.

    Args:
        outcomes: damages by kind, and what was lost; losses below zero count as none.
        prior: weights before.

    Example:
        >>> found = calibrated([({"depth": 1.0}, 0.02), ({"depth": 2.0}, 0.04)], {"depth": 0.1, "width": 0.2})
        >>> round(found["depth"], 3), round(found["width"], 3)
        (0.02, 0.04)
    """
    kinds = list(prior)
    seen = np.array([[damages.get(kind, 0.0) for kind in kinds] for damages, _ in outcomes])
    lost = np.array([max(drop, 0.0) for _, drop in outcomes])
    before = np.array([prior[kind] for kind in kinds])
    raw = seen @ before if len(seen) else np.zeros(0)
    if not raw.any() or not lost.any():
        return dict(prior)
    before = before * (raw @ lost) / (raw @ raw)
    # Each kind moves its weight as far as it is seen: the ridge is laid on weights in units of the prior.
    scaled = seen * before
    ridge = np.sqrt(_TRUST * np.mean(np.square(scaled.sum(1)))) * np.eye(len(kinds))
    factors, _ = nnls(np.vstack([scaled, ridge]), np.concatenate([lost, ridge @ np.ones(len(kinds))]))
    return {kind: float(weight) for kind, weight in zip(kinds, factors * before, strict=True)}


def _kind(form: Form) -> Kind:
    if form.scheme == "packed":
        return "packed4" if form.bits == 4 else "packed8"
    # Float weights have no damage to weigh.
    return "int8"


def _finite(value: float) -> float:
    return min(value, _BROKEN)
