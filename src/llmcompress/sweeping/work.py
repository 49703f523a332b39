"""The work of a sweep, in one folder: any number of processes, on one machine or on several, do it together.

The folder of a run holds `work.json`, what is to be done; a lock and a mark for each job; and what failed. A worker
takes the first job that nobody holds and whose predecessor is done, until none is left. It needs nothing but the
folder, so that whatever starts processes will do.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import load, save
from ..data import Example, Span, find_tokenizer
from ..errors import BusyError
from ..evaluation.inference import threads_set_to
from ..locks import locked
from ..pipeline import Pipeline, compress
from ..registry import compressors
from ..resume import Stages
from ..tensor_files import write_json
from .chains import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Seconds between two looks at jobs that others hold.
_PAUSE = 0.2
# What launchers of distributed training tell a process: a worker works alone.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        finished: steps from the model on that were run, or read from an earlier run.
        failed: why there is no model of use, or None.
    """

    finished: int
    failed: str | None = None


@dataclass(frozen=True)
class Run:
    """One run of a sweep, as its folder tells it.

    Attributes:
        folder: of the sweep.
        name: of the run; the folder may hold others, whose stages are used again.
    """

    folder: Path
    name: str

    @property
    def place(self) -> Path:
        """Where marks, locks and failures are."""
        return self.folder / "runs" / self.name

    @property
    def stages(self) -> Path:
        """Where stages are kept, of all runs."""
        return self.folder / "stages"

    @property
    def base(self) -> Path:
        """Where the model is that all chains start from, as long as there are other workers than this process."""
        return self.place / "base"

    @property
    def comparison(self) -> Path:
        """Where what was found is written."""
        return self.place / "comparison.json"

    def model(self, chain: str) -> Path:
        """Return where the model that a chain made is."""
        return self.folder / "models" / chain

    def outcome(self, number: int) -> Outcome | None:
        """Return how a job ended, or None where it has not."""
        path = self._mark(number)
        return Outcome(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def end(self, number: int, outcome: Outcome) -> None:
        """Tell how a job ended."""
        write_json(asdict(outcome), self._mark(number))

    def forget_base(self) -> None:
        """Delete the copy of the model that the workers read."""
        shutil.rmtree(self.base, ignore_errors=True)

    def _mark(self, number: int) -> Path:
        return self.place / f"{number}.over.json"


@dataclass(frozen=True)
class Worker:
    """What a worker knows of a run.

    Attributes:
        run: where it is.
        jobs: from `plan_jobs`.
        base: the model that all chains start from.
        tokenizer: of the model, if there is one.
        data: what the steps learn from.
        seed: of every chain.
        threads: of torch; None leaves them.
        progress: whether bars are shown.
    """

    run: Run
    jobs: Sequence[Job]
    base: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    data: Sequence[Example] | None
    seed: int
    threads: int | None
    progress: bool

    def write(self) -> None:
        """Write all of it for workers in other processes."""
        save(self.base, self.run.base, tokenizer=self.tokenizer, metadata={})
        jobs = [
            {"steps": [step.to_dict() for step in job.steps], "before": job.before, "chains": job.chains}
            for job in self.jobs
        ]
        told = {
            "jobs": jobs,
            "data": None if self.data is None else [asdict(example) for example in self.data],
            "frozen": [name for name, weight in self.base.named_parameters() if not weight.requires_grad],
            "tokenizer": self.tokenizer is not None,
            "device": self.base.device.type,
            "seed": self.seed,
            "threads": self.threads,
            "progress": self.progress,
        }
        write_json(told, self.run.place / "work.json")

    @classmethod
    def read(cls, run: Run) -> Worker:
        """Read what another process wrote."""
        told = json.loads((run.place / "work.json").read_text(encoding="utf-8"))
        base = load(run.base).to(told["device"])
        for name in told["frozen"]:
            base.get_parameter(name).requires_grad_(False)
        return cls(
            run,
            jobs=[
                Job(tuple(map(compressors.create, job["steps"])), job["before"], tuple(job["chains"]))
                for job in told["jobs"]
            ],
            base=base,
            tokenizer=find_tokenizer(base, who="sweep") if told["tokenizer"] else None,
            data=None if told["data"] is None else [Example(**_read_example(example)) for example in told["data"]],
            seed=told["seed"],
            threads=told["threads"],
            progress=told["progress"],
        )

    def go(self) -> None:
        """Do jobs until all are over, by whomever."""
        numbers = range(len(self.jobs))
        with threads_set_to(self.threads):
            while left := [number for number in numbers if self.run.outcome(number) is None]:
                if not any(self._try(number) for number in left):
                    time.sleep(_PAUSE)

    def _try(self, number: int) -> bool:
        """Do a job if it can be done now; tell whether it is over."""
        before = self.jobs[number].before
        earlier = None if before is None else self.run.outcome(before)
        if before is not None and earlier is None:
            return False
        try:
            with locked(self.run.place / f"{number}.lock", "another worker does it"):
                if self.run.outcome(number) is None:
                    broken = earlier is not None and earlier.failed is not None
                    self.run.end(number, earlier if earlier is not None and broken else self._do(self.jobs[number]))
        except BusyError:
            return False
        return True

    def _do(self, job: Job) -> Outcome:
        """Do a job, and tell how it ended."""
        try:
            result = compress(
                self.base,
                Pipeline(steps=job.steps),
                data=self.data,
                tokenizer=self.tokenizer,
                seed=self.seed,
                resume_dir=self.run.stages,
                progress=self.progress,
            )
            for chain in job.chains:
                result.save_pretrained(self.run.model(chain))
        # What a chain breaks on, of whatever kind, must not take the others with it; all of it is told.
        except Exception as error:
            return Outcome(self._finished(job), f"{type(error).__name__}: {error}")
        return Outcome(len(job.steps))

    def _finished(self, job: Job) -> int:
        """Count the steps of a job that failed whose stages are there."""
        stages = Stages(self.run.stages, self.base, self.data, self.seed, self.tokenizer)
        return sum(1 for _ in itertools.takewhile(lambda step: stages.find(step) is not None, job.steps))


def work_alone(folder: str, name: str) -> None:
    """Do jobs of a run as a process of its own, whatever launched it; on an accelerator of its own, if there is one."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = local
    for variable in _LAUNCHED:
        os.environ.pop(variable, None)
    Worker.read(Run(Path(folder), name)).go()


def _read_example(told: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither tuples nor spans, of which examples are made."""
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return {name: Span(**value) if isinstance(value, dict) else value for name, value in found.items()}
