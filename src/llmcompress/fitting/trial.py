"""What a search asks for: what a chain costs, and what a run of it loses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

from .chain import Chain
from .failures import let_go, reason_of

Stage = Literal["untrained", "short", "longer", "nearest", "final"]


@dataclass(frozen=True)
class Cost:
    """What a chain comes to on this machine.

    Attributes:
        bytes: on disk.
        ms: of a pass at the shape of the targets; None where no time is asked for.
        speedup: against the base, in turns; None likewise.
    """

    bytes: int
    ms: float | None = None
    speedup: float | None = None


@dataclass(frozen=True)
class Trial:
    """One chain that was run.

    Attributes:
        chain: what was run.
        stage: of the search.
        steps: how long it was trained; 0 where it was not.
        cost: what it comes to.
        drop: lost on the examples to choose by; None where it failed.
        noise: half of the 95 % interval of that drop.
        seconds: that it took.
        error: why it failed, in one line, or None.
        cause: what was raised then.
    """

    chain: Chain
    stage: Stage
    steps: int
    cost: Cost | None
    drop: float | None
    noise: float
    seconds: float
    error: str | None = None
    cause: Exception | None = field(default=None, repr=False, compare=False)

    @classmethod
    def failed(
        cls, chain: Chain, stage: Stage, error: Exception, *, steps: int = 0, cost: Cost | None = None, seconds: float
    ) -> Trial:
        """Return the trial of a chain that broke on `error`, which lets go of the models that its frames hold."""
        let_go(error)
        return cls(chain, stage, steps, cost, None, 0.0, seconds, reason_of(error), error)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values."""
        cost = None if self.cost is None else asdict(self.cost)
        own = {"chain": self.chain.name, "steps_of_chain": [step.to_dict() for step in self.chain.steps()]}
        told = ("stage", "steps", "drop", "noise", "seconds", "error")
        return {**own, **{name: getattr(self, name) for name in told}, "cost": cost}


class Lab(Protocol):
    """What a search asks for; each raises whatever the chain breaks on."""

    def cost(self, chain: Chain) -> Cost:
        """Build a chain, untrained, and measure what it comes to; once, however often it is asked for."""

    def run(self, chain: Chain, steps: int, stage: Stage) -> Trial:
        """Train a chain for so many steps and score it on the examples to choose by."""

    def steps_in(self, chain: Chain, seconds: float) -> int:
        """Return for how many steps a run of so many seconds can train; 0 where there is nothing to train."""
