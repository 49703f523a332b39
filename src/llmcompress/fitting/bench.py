"""Real runs of chains: built, trained for so many steps, scored on examples held out, measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..anatomy.footprint import disk_bytes
from ..compressor import Compressor, Context
from ..distillation.distillation import KnowledgeDistillation
from ..errors import CompressionError
from ..evaluation.latency import measure_latencies, speedup
from ..evaluation.scoring import paired_tests
from ..pipeline import compress
from .budget import Budget
from .chain import Chain
from .made import make
from .targets import Targets, drop_of
from .trial import Cost, Stage, Trial

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..evaluation.tasks import Task, TaskScore
    from ..result import Result

# Trainings of so many steps tell how long one takes: the first one has the teacher answer, the second one is hardly
# more than what surrounds the steps.
_PROBED = (1, 2, 24)
# A model is timed for such a share of the budget, and the result for longer, within such seconds: what a neighbour of a
# shared machine does in half a second is no speed.
_TIMED, _RESULT_TIMED = 0.002, 0.006
_LEAST_TIMED, _MOST_TIMED = 0.5, 6.0
# Of the time that a step takes, what does not shrink with the blocks: reading, the optimizer.
_FIXED = 0.15


@dataclass
class Bench:
    """The lab of a search: real models, real data.

    Attributes:
        model: the base and teacher.
        context: data, tokenizer, seed.
        recovery: the training, without its steps; None where the model cannot be distilled.
        targets: what is asked for.
        choose: the task to choose by.
        base: the base's score on it.
        base_ms: what a pass of the base takes by the survey, in float.
        most_steps: more training than this is not worth it.
        clock: by which runs are timed.
    """

    model: PreTrainedModel
    context: Context
    recovery: KnowledgeDistillation | None
    targets: Targets
    choose: Task
    base: TaskScore
    base_ms: float
    most_steps: int
    clock: Budget
    _step_seconds: float | None = field(default=None, init=False)
    _training: float = field(default=0.0, init=False)
    _around: float = field(default=0.0, init=False)
    _costs: dict[str, Cost] = field(default_factory=dict, init=False)

    def cost(self, chain: Chain) -> Cost:
        """See `Lab.cost`."""
        # By the steps: chains that differ in which blocks have 8 bits have one name.
        steps = json.dumps([step.to_dict() for step in chain.steps()])
        if steps not in self._costs:
            self._costs[steps] = self._measured(make(self.model, chain.steps(), self.context).model, _TIMED)
        return self._costs[steps]

    def result_cost(self, model: PreTrainedModel) -> Cost:
        """Return what the result comes to."""
        return self._measured(model, _RESULT_TIMED)

    def _measured(self, model: PreTrainedModel, share: float) -> Cost:
        """Return the bytes of a model, and how fast it is beside the base if that is asked for."""
        size = disk_bytes(model)
        if not self.targets.timed:
            return Cost(size)
        rows, tokens = self.targets.shape
        both = {"base": self.model, "chain": model}
        seconds = min(max(share * self.targets.budget, _LEAST_TIMED), _MOST_TIMED)
        timed = measure_latencies(both, batch_size=rows, tokens=tokens, seconds=seconds, progress=False)
        return Cost(size, timed["chain"].median_ms, speedup(timed["base"], timed["chain"]).ratio)

    def final(self, chain: Chain, steps: int, task: Task) -> Result:
        """Run a chain as users do, each step measured and scored."""
        return compress(
            self.model,
            chain.steps(self.recovery_of(steps)),
            data=self.context.data,
            tokenizer=self.context.tokenizer,
            task=task,
            seed=self.context.seed,
            progress=False,
        )

    def run(self, chain: Chain, steps: int, stage: Stage) -> Trial:
        """See `Lab.run`.

        Raises:
            CompressionError: its score is no finite number.
        """
        begin, cost = self.clock.spent(), self.cost(chain)
        made = make(self.model, self._timed(chain, steps), self.context)
        score = self.choose.evaluate(made.model, made.tokenizer, progress=False)
        seconds, drop = self.clock.spent() - begin, drop_of(self.base, score)
        if not math.isfinite(drop):
            raise CompressionError(f"its {score.primary} is {score.value}")
        noise = noise_of(self.choose, self.base, score)
        self._around = seconds - self._training if steps else self._around
        return Trial(chain, stage, steps, cost, drop, noise, seconds)

    def _timed(self, chain: Chain, steps: int) -> Iterator[Compressor]:
        """Yield the steps of a chain, and learn from what lies between how long training takes."""
        self._training = 0.0
        for step in chain.steps(self.recovery_of(steps)):
            before = self.clock.spent()
            yield step
            if isinstance(step, KnowledgeDistillation):
                self._training = max(self.clock.spent() - before, 1e-9)
                self._step_seconds = self._training / steps / self._share(chain)

    def steps_in(self, chain: Chain, seconds: float) -> int:
        """See `Lab.steps_in`."""
        if self.recovery is None or not chain.recovers:
            return 0
        if self._step_seconds is None:
            self._probe(chain)
        assert self._step_seconds is not None
        steps = (seconds - self._around) / (self._step_seconds * self._share(chain))
        return max(min(int(steps), self.most_steps), 1)

    def _probe(self, chain: Chain) -> None:
        """Have the teacher answer all rows once, and find how long a step takes."""
        took = []
        for steps in _PROBED:
            make(self.model, self._timed(chain, steps), self.context)
            took.append(self._training)
        *_, few, many = _PROBED
        each = (took[-1] - took[-2]) / (many - few)
        if each > 0:
            self._step_seconds = each / self._share(chain)

    def recovery_of(self, steps: int) -> KnowledgeDistillation | None:
        """Return a training of so many steps; None where nothing is trained."""
        if self.recovery is None or not steps:
            return None
        return self.recovery.model_copy(update={"steps": steps, "epochs": None})

    def _share(self, chain: Chain) -> float:
        """Return how long a training step takes beside one of the base, about."""
        return _FIXED + (1 - _FIXED) * chain.float_ms / self.base_ms


def noise_of(task: Task, base: TaskScore, score: TaskScore) -> float:
    """Return half of the 95 % interval of the difference of two scores; 0 where the sample cannot tell."""
    test = next((one for one in paired_tests(task, base, score) if one.metric == base.primary), None)
    if test is None or test.low is None or test.high is None:
        return 0.0
    # A ratio's interval is one of the base's value.
    unit = base.value if test.scale == "ratio" else 1.0
    return unit * (test.high - test.low) / 2
