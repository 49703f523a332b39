"""The work of a sweep, in one folder: any number of processes, on one machine or on several, do it together.

The folder of a run holds `work.json`, what is to be done; a lock and a mark for each job; and what failed. A worker
takes the first job that nobody holds and whose predecessor is done, until none is left. It needs nothing but the
folder, so that whatever starts processes will do.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..checkpoint import load, save
from ..data import Example, Span, find_tokenizer
from ..errors import CompressionError
from ..evaluation.inference import threads_set_to
from ..pipeline import Pipeline, compress
from ..registry import compressors
from .chains import Job

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Seconds between two looks at jobs that others hold.
_PAUSE = 0.2
# What launchers of distributed training tell a process: a worker works alone.
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")


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

    def model(self, chain: str) -> Path:
        """Return where the model that a chain made is."""
        return self.folder / "models" / chain

    def write(
        self,
        jobs: Sequence[Job],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        data: Sequence[Example] | None,
        *,
        seed: int,
        threads: int | None,
        progress: bool,
    ) -> None:
        """Write what is to be done, whole or not at all.

        Args:
            jobs: from `plan_jobs`.
            model: that all chains start from.
            tokenizer: of the model, if there is one.
            data: what the steps learn from.
            seed: of every chain.
            threads: of torch, in each worker; None leaves them.
            progress: whether bars are shown.
        """
        self.place.mkdir(parents=True, exist_ok=True)
        save(model, self.place / "base", tokenizer=tokenizer, metadata={})
        told = {
            "jobs": [
                {"steps": [step.to_dict() for step in job.steps], "before": job.before, "chains": job.chains}
                for job in jobs
            ],
            "data": None if data is None else [asdict(example) for example in data],
            "frozen": [name for name, weight in model.named_parameters() if not weight.requires_grad],
            "tokenizer": tokenizer is not None,
            "device": model.device.type,
            "seed": seed,
            "threads": threads,
            "progress": progress,
        }
        draft = self.place / "work.json.draft"
        draft.write_text(json.dumps(told), encoding="utf-8")
        os.replace(draft, self.place / "work.json")

    @property
    def comparison(self) -> Path:
        """Where what was found is written."""
        return self.place / "comparison.json"

    def failures(self, jobs: Sequence[Job]) -> dict[int, str]:
        """Return why jobs failed, by number."""
        reasons = {number: self.failure(number) for number in range(len(jobs))}
        return {number: reason for number, reason in reasons.items() if reason is not None}

    def failure(self, number: int) -> str | None:
        """Return why a job failed, or None."""
        path = self.place / f"{number}.failed"
        return path.read_text(encoding="utf-8") if path.exists() else None

    def is_over(self, number: int) -> bool:
        """Tell whether a job was done, or failed."""
        return any((self.place / f"{number}.{mark}").exists() for mark in ("done", "failed"))


def work(run: Run) -> None:
    """Do jobs of a run until all are over, by whomever."""
    told = json.loads((run.place / "work.json").read_text(encoding="utf-8"))
    jobs = [
        Job(tuple(map(compressors.create, job["steps"])), job["before"], tuple(job["chains"])) for job in told["jobs"]
    ]
    base = load(run.place / "base").to(told["device"])
    for name in told["frozen"]:
        base.get_parameter(name).requires_grad_(False)
    tokenizer = find_tokenizer(base, who="sweep") if told["tokenizer"] else None
    data = None if told["data"] is None else [Example(**_read_example(example)) for example in told["data"]]
    with threads_set_to(told["threads"]):
        while left := [number for number in range(len(jobs)) if not run.is_over(number)]:
            if not any(_try(run, number, jobs, base, tokenizer, data, told) for number in left):
                time.sleep(_PAUSE)


def work_alone(folder: str, name: str) -> None:
    """Do jobs of a run as a process of its own, whatever launched it; on an accelerator of its own, if there is one."""
    local = os.environ.get("LOCAL_RANK")
    if local is not None and "CUDA_VISIBLE_DEVICES" not in os.environ:
        os.environ["CUDA_VISIBLE_DEVICES"] = local
    for variable in _LAUNCHED:
        os.environ.pop(variable, None)
    work(Run(Path(folder), name))


def _try(
    run: Run,
    number: int,
    jobs: Sequence[Job],
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Sequence[Example] | None,
    told: dict[str, Any],
) -> bool:
    """Do a job if it can be done now; tell whether it is over."""
    job = jobs[number]
    if job.before is not None and not run.is_over(job.before):
        return False
    lock = FileLock(run.place / f"{number}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        return False
    with lock:
        if run.is_over(number):
            return True
        failed = None if job.before is None else run.failure(job.before)
        if failed is None:
            try:
                _do(run, job, base, tokenizer, data, told)
            # What a chain breaks on must not take the others with it; all of it is told.
            except (CompressionError, RuntimeError, ValueError, OSError, MemoryError) as error:
                failed = f"{type(error).__name__}: {error}"
        if failed is None:
            (run.place / f"{number}.done").touch()
        else:
            (run.place / f"{number}.failed").write_text(failed, encoding="utf-8")
    return True


def _do(
    run: Run,
    job: Job,
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    data: Sequence[Example] | None,
    told: dict[str, Any],
) -> None:
    result = compress(
        base,
        Pipeline(steps=job.steps),
        data=data,
        tokenizer=tokenizer,
        seed=told["seed"],
        resume_dir=run.stages,
        progress=told["progress"],
    )
    for chain in job.chains:
        result.save_pretrained(run.model(chain))


def _read_example(told: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither tuples nor spans, of which examples are made."""
    found = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
    return {name: Span(**value) if isinstance(value, dict) else value for name, value in found.items()}
