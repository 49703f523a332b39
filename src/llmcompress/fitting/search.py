"""The search: what the solver proposes is run for real, few steps first, and what comes out teaches the next proposal.

Successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943): several chains are trained briefly, the best two for
twice as long, and the best one for all the time that is left. Each training starts anew, so that the chain that is
returned is one recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import log2

from .budget import Budget
from .chain import Chain, chain_of
from .predictor import Predictor
from .solver import Cost as Kind
from .solver import Skeleton, Solution, solve
from .targets import Targets
from .trial import Cost, Lab, Stage, Trial

_CANDIDATES = 4
# Units of time by the number of chains: one for each short run, one for a chain proposed by their outcomes, two for
# each of two longer runs, and about as many for the final one.
_UNITS = {1: 3, 2: 12, 3: 14, 4: 16}
# A run of fewer steps tells nothing: then fewer chains are run.
_FEWEST_STEPS = 25
# What a measured time must be below its limit by when a chain is chosen: it is measured again at the end.
_MARGIN = 0.04
# How often a chain is proposed anew where its measured cost is above a limit.
_TRIES = 4
# Share of the time that is left in which chains are proposed, built and measured, before they are trained.
_PROPOSING = 0.15
# Where a limit cannot be met: how far towards the base, on a scale of ratios, the nearest ones are looked for.
_RELAXED = (0.0, 1 / 3, 2 / 3)
# How far from what is expected of a chain its loss is, as a share of that.
_UNSURE = 0.3
# Between the nearest that failed and the first that did not, how many more are tried, each in the middle.
_HALVED = 2
# Units of time for the final training of what was found so; one is for each that is tried.
_FINAL = 4
# How many chains are tried in the last training, should it break.
_LAST_TRIES = 3


@dataclass(frozen=True)
class Found:
    """What a search ends with.

    Attributes:
        chains: the one to train for the rest of the time, and those that take its place where that breaks; none where
            none could be built.
        trials: all that were run, or broke before, in order.
        least: the least that can be reached of each cost that has a limit, as predicted.
        feasible: whether any chain may be within the limits: one is, or there are others that broke, or that there was
            no time for.
    """

    chains: Sequence[Chain]
    trials: Sequence[Trial]
    least: Mapping[Kind, float]
    feasible: bool


class Search:
    """One search.

    Args:
        predictor: proposes chains; it is calibrated by what they lose.
        lab: runs them.
        targets: what is asked for.
        base: the base's own cost.
        budget: the clock.
        reserve: seconds that are kept for what comes behind the last training.
    """

    def __init__(
        self, predictor: Predictor, lab: Lab, targets: Targets, base: Cost, budget: Budget, reserve: float = 0.0
    ) -> None:
        self._predictor, self._lab, self._targets, self._base = predictor, lab, targets, base
        self._budget, self._reserve = budget, reserve
        self._trials: list[Trial] = []
        self._excluded: set[Skeleton] = {predictor.problem().unchanged}
        self._slow: dict[Skeleton, float] = {}
        self._evened: list[tuple[Solution, Solution]] = []
        self._vocabulary: int | None = None
        self._over: Chain | None = None
        self._hurried = False

    def run(self) -> Found:
        """Propose, run, halve."""
        limits = self._limits()
        least = self._least(limits)
        with self._budget.stage("solving"):
            first = self._proposals(limits, _CANDIDATES)
        feasible = bool(first or self._trials) or self._hurried or not self._predictor.complete
        if first:
            first = self._answered(first)
            first = first[: self._affordable(first)]
        unit = self._left() / _UNITS[max(len(first), 1)]
        short = [self._run(chain, unit, "short") for chain in first]
        if len(short) > 1:
            short += self._proposed_anew(limits, short, unit)
        again = self._likely(short)[:2] if len(short) > 1 and self._left() else []
        longer = [self._run(trial.chain, 2 * unit, "longer") for trial in again]
        winner = next(iter(self._likely(longer) or self._likely(short)), None)
        if winner is None or self._hopeless(winner, short):
            winner = self._nearest(limits, least, winner)
        return Found(self._ranked(winner), self._trials, least, feasible)

    def _ranked(self, winner: Trial | None) -> list[Chain]:
        """Return the winner's chain, and the next best for where that breaks in the last training."""
        others = sorted(_best(self._trials), key=lambda trial: not self._within(trial.cost))
        ranked = [trial.chain for trial in ([winner] if winner is not None else []) + others]
        if self._over is not None and not any(trial.chain == self._over and trial.error for trial in self._trials):
            ranked.append(self._over)
        return [chain for place, chain in enumerate(ranked) if chain not in ranked[:place]][:_LAST_TRIES]

    def _answered(self, chains: Sequence[Chain]) -> list[Chain]:
        """Have the teacher answer all rows, once, which is no part of a unit; return the chains that bear it."""
        broken: list[Chain] = []
        with self._budget.stage("the teacher's answers"):
            for chain in chains:
                begin = self._budget.spent()
                try:
                    if self._lab.steps_in(chain, 1.0):
                        break
                except Exception as error:
                    self._broke(chain, "short", error, begin)
                    broken.append(chain)
        return [chain for chain in chains if chain not in broken]

    def _broke(
        self, chain: Chain, stage: Stage, error: Exception, begin: float, *, steps: int = 0, cost: Cost | None = None
    ) -> Trial:
        """Record and tell that a chain broke, on whatever it was: the others go on."""
        trial = Trial.failed(chain, stage, error, steps=steps, cost=cost, seconds=self._budget.spent() - begin)
        self._trials.append(trial)
        self._budget.tell(f"{chain.name} failed: {trial.error}")
        return trial

    def _likely(self, trials: Sequence[Trial]) -> list[Trial]:
        """Return those that did not fail, the one that is likely to lose least first.

        A few hundred examples tell a drop to some points only. Each is drawn towards what is expected of its chain, the
        more the less the examples tell (an empirical Bayes estimate); the predictor is calibrated by all of them first.
        """
        done = _best(trials)
        self._predictor.calibrate(self._outcomes(done))

        def likely(trial: Trial) -> float:
            assert trial.drop is not None
            expected = self._predictor.expected(self._judged_as(trial.chain.solution))
            unsure, noise = (_UNSURE * expected) ** 2, (trial.noise / 1.96) ** 2
            share = unsure / (unsure + noise) if noise else 1.0
            return expected + share * (trial.drop - expected)

        return sorted(done, key=likely)

    def _outcomes(self, trials: Sequence[Trial]) -> list[tuple[Solution, float]]:
        return [(self._judged_as(trial.chain.solution), trial.drop) for trial in trials if trial.drop is not None]

    def _judged_as(self, solution: Solution) -> Solution:
        """Return the choice by whose damages a chain is judged.

        Evenly spread blocks do more harm than those that the solver chose until they are trained, and no more then.
        """
        return next((chosen for even, chosen in self._evened if even is solution), solution)

    def _hopeless(self, winner: Trial, short: Sequence[Trial]) -> bool:
        """Tell whether a chain loses too much even if each doubling of its training gains as much as the last one."""
        assert winner.drop is not None
        before = next(
            (trial.drop for trial in short if trial.chain == winner.chain and trial.drop is not None), winner.drop
        )
        gain = max(before - winner.drop, 0.0)
        more = self._lab.steps_in(winner.chain, self._left()) / winner.steps if winner.steps else 1.0
        return winner.drop - gain * log2(max(more, 1.0)) - winner.noise > self._targets.max_drop

    def _affordable(self, chains: Sequence[Chain]) -> int:
        """Return how many chains there is time to try with some steps each."""
        trained = next((chain for chain in chains if chain.recovers), None)
        if trained is None:
            return len(chains)
        # Of few data so many steps are never worth it, whatever the time.
        enough = min(_FEWEST_STEPS, self._lab.steps_in(trained, self._left()))
        counts = range(len(chains), 1, -1)
        return next((n for n in counts if self._lab.steps_in(trained, self._left() / _UNITS[n]) >= enough), 1)

    def _left(self) -> float:
        return max(self._budget.left() - self._reserve, 0.0)

    def _limits(self) -> dict[Kind, float]:
        limits: dict[Kind, float] = {}
        if self._targets.size is not None:
            limits["bytes"] = float(self._targets.size)
        if self._base.ms is not None and (most := self._targets.milliseconds(self._base.ms)) is not None:
            limits["ms"] = most * (1 - _MARGIN)
        return limits

    def _least(self, limits: Mapping[Kind, float]) -> dict[Kind, float]:
        found = {cost: solve(self._predictor.problem(), {}, minimise=cost) for cost in limits}
        return {cost: float(getattr(one, cost)) for cost, one in found.items() if one is not None}

    def _proposals(self, limits: Mapping[Kind, float], count: int) -> list[Chain]:
        """Return different chains within `limits`, of least expected damage, each built and measured."""
        chains: list[Chain] = []
        until = self._budget.spent() + _PROPOSING * self._left()
        for tried in range(_TRIES * count):
            if len(chains) == count:
                break
            # Without any chain there is nothing to train: one is looked for as long as there is time at all.
            if tried and self._budget.spent() > until and (chains or not self._left()):
                self._hurried = True
                break
            solution = solve(
                self._predictor.problem(),
                limits,
                excluded=self._excluded | self._too_slow(limits),
                vocabulary=self._vocabulary,
                seconds=until - self._budget.spent(),
            )
            if solution is None:
                break
            chain = self._built(solution, limits)
            if chain is None:
                continue
            chains.append(chain)
            even = self._spread(solution) if len(chains) == 1 < count else None
            # Of the same skeleton it is as fast.
            untimed: dict[Kind, float] = {cost: limit for cost, limit in limits.items() if cost != "ms"}
            if even is not None and (other := self._built(even, untimed)) is not None:
                self._evened.append((even, solution))
                chains.append(other)
        return chains

    def _built(self, solution: Solution, limits: Mapping[Kind, float]) -> Chain | None:
        """Return the chain if it really is within `limits`; else learn from it, or never propose it again."""
        chain, begin = chain_of(self._predictor, solution), self._budget.spent()
        try:
            cost = self._lab.cost(chain)
        except Exception as error:
            self._broke(chain, "untrained", error, begin)
            self._excluded.add(solution.skeleton)
            return None
        # Where time runs out before any is within the limits, this is the nearest that was built.
        self._over = chain
        if cost.ms is not None:
            took = self._base_time(cost)
            self._predictor.time_of(solution, took)
            if took > limits.get("ms", took):
                # Within wider limits it may come again.
                self._slow[solution.skeleton] = took
                return None
        if cost.bytes > limits.get("bytes", cost.bytes):
            self._excluded.add(solution.skeleton)
            return None
        self._excluded.add(solution.skeleton)
        if self._vocabulary is None:
            # One vocabulary for all: then they share the teacher's answers.
            self._vocabulary = solution.rest.vocabulary
        return chain

    def _too_slow(self, limits: Mapping[Kind, float]) -> set[Skeleton]:
        """Return what was measured to take longer than is allowed."""
        return {skeleton for skeleton, took in self._slow.items() if took > limits.get("ms", took)}

    def _base_time(self, cost: Cost) -> float:
        """Return a chain's time on the base's clock of the start: a ratio of turns is steadier than milliseconds."""
        assert cost.ms is not None
        if cost.speedup is None or self._base.ms is None or self._targets.speedup is None:
            return cost.ms
        return self._base.ms / cost.speedup

    def _spread(self, solution: Solution) -> Solution | None:
        """Return the same with evenly spread blocks, or None: each then does the work of those behind it."""
        stacks = self._predictor.space.stack_blocks
        of, keep = len(stacks[0]), len(solution.kept)
        ways = set(solution.kept.values())
        even = spread(of, keep)
        mixed = len({way.bits for way in ways}) > 1
        problem, way = self._predictor.problem(), solution.skeleton
        possible = len(stacks) == 1 and keep <= of / 2 and set(problem.fixed) <= set(even)
        if not possible or mixed or set(even) == set(solution.kept):
            return None
        bits = next(iter(ways)).bits
        kept = {
            number: next(
                own
                for own in problem.blocks[number]
                if (own.shape, own.scheme, own.bits) == (way.shape, way.scheme, bits)
            )
            for number in even
        }
        return replace(solution, kept=kept)

    def _run(self, chain: Chain, seconds: float, stage: Stage) -> Trial:
        begin, steps, cost = self._budget.spent(), 0, None
        with self._budget.stage(f"{stage}: {chain.name}"):
            try:
                cost = self._lab.cost(chain)
                steps = self._lab.steps_in(chain, seconds)
                trial = self._lab.run(chain, steps, stage)
            except Exception as error:
                return self._broke(chain, stage, error, begin, steps=steps, cost=cost)
        self._trials.append(trial)
        return trial

    def _proposed_anew(self, limits: Mapping[Kind, float], short: Sequence[Trial], unit: float) -> list[Trial]:
        """Run one more chain where the outcomes say that it may be better than those that were run."""
        outcomes = self._outcomes(short)
        if not outcomes:
            return []
        self._predictor.calibrate(outcomes)
        more = self._proposals(limits, 1)
        best = min(drop for _, drop in outcomes)
        if not more or self._predictor.expected(more[0].solution) >= best:
            return []
        return [self._run(more[0], unit, "short")]

    def _nearest(self, limits: Mapping[Kind, float], least: Mapping[Kind, float], best: Trial | None) -> Trial | None:
        """Look for the nearest to the limits that loses no more than is allowed; else for what loses least."""
        trials = [best] if best is not None else []
        unit = self._left() / (len(_RELAXED) + _HALVED + _FINAL)
        self._vocabulary = None if best is None else self._vocabulary

        def tried(share: float) -> Trial | None:
            # Whatever the time, something must come back.
            ends = not self._left() and bool(_best(trials))
            chains = [] if ends else self._proposals(self._relaxed(limits, least, share), 1)
            if not chains:
                return None
            trials.append(self._run(chains[0], unit, "nearest"))
            return trials[-1]

        def holds(trial: Trial | None) -> bool:
            return trial is not None and trial.drop is not None and trial.drop <= self._targets.max_drop

        failed = 0.0
        for share in _RELAXED if best is None else _RELAXED[1:]:
            nearest = tried(share)
            if holds(nearest):
                break
            failed = share
        else:
            return next(iter(_best(trials)), None)
        for _ in range(_HALVED if share > 0 else 0):
            middle = (failed + share) / 2
            nearer = tried(middle)
            if holds(nearer):
                nearest, share = nearer, middle
            else:
                failed = middle
        return nearest

    def _relaxed(self, limits: Mapping[Kind, float], least: Mapping[Kind, float], share: float) -> dict[Kind, float]:
        """Return the limits moved by `share` of the way to the base, on a scale of ratios, from what can be reached."""
        base = {"bytes": float(self._base.bytes), "ms": self._base.ms or 0.0}
        floors = {cost: max(limit, least.get(cost, 0.0) * 1.001) for cost, limit in limits.items()}
        return {cost: floor * (base[cost] / floor) ** share for cost, floor in floors.items()}

    def _within(self, cost: Cost | None) -> bool:
        return cost is not None and self._targets.hold(cost.bytes, cost.ms, cost.speedup)


def spread(of: int, keep: int) -> tuple[int, ...]:
    """Return `keep` of `of` blocks: the first, and the others evenly behind it.

    Example:
        >>> spread(6, 2), spread(6, 3), spread(12, 4)
        ((0, 3), (0, 2, 4), (0, 3, 6, 9))
    """
    return tuple(index * of // keep for index in range(keep))


def _best(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that worked, the one that lost least first."""
    worked = [trial for trial in trials if trial.drop is not None]
    return sorted(worked, key=lambda trial: (trial.drop, trial.cost.bytes if trial.cost else 0))
