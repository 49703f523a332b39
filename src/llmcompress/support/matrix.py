"""The runner of the support matrix: workers side by side, none of which can stop it, and a file to continue from."""

from __future__ import annotations

import multiprocessing
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import get_args

from tqdm.auto import tqdm

from ..errors import ConfigError, NothingToCompressError, did_you_mean
from ..places import check_place
from .checks import STRATEGIES
from .entries import Entry, append_entries, read_entries, versions
from .examine import examine
from .tiny_models import TASKS
from .worker import Examine, Job, Outcome, Status, serve

# Importing torch and transformers comes on top of the first strategy's time.
_START_SECONDS = 120.0
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass
class _Worker:
    """A process with its job, and when it must have said something."""

    process: multiprocessing.process.BaseProcess
    connection: Connection
    job: Job | None = None
    waiting: list[str] = field(default_factory=list)
    deadline: float = 0.0
    fresh: bool = True


def choose_jobs(
    architectures: Sequence[str] = (), strategies: Sequence[str] = (), tasks: Sequence[str] = ()
) -> list[Job]:
    """Return the jobs whose architecture, strategy and task match one of the shell patterns each; all without any.

    Raises:
        NothingToCompressError: a pattern matches nothing.

    Example:
        >>> choose_jobs(["bert"], ["f*"])
        [Job(task='causal-lm', architecture='bert', strategies=('ffn',)), Job(task='classification', ...]
    """
    chosen = tuple(_matching(STRATEGIES, strategies, "--strategy must match a strategy"))
    kept = _matching(TASKS, tasks, "--task must match a task")
    known = dict.fromkeys(name for key in kept for name in TASKS[key].classes)
    wanted = set(_matching(known, architectures, "ARCHITECTURE must match an architecture"))
    return [Job(key, name, chosen) for key in kept for name in TASKS[key].classes if name in wanted]


def run(
    jobs: Sequence[Job],
    out: Path,
    *,
    workers: int = 2,
    timeout: float = 120.0,
    retry: Sequence[str] = (),
    progress: bool = True,
    examine: Examine = examine,
) -> list[Entry]:
    """Try what `jobs` ask and `out` does not hold yet, append each outcome to `out`, and return all that was asked.

    A strategy that takes longer than `timeout` seconds, and one that kills its process, have failed; the run goes on
    with the next one in a new process.

    Args:
        jobs: what to try.
        out: JSON-lines file of finished entries.
        workers: processes.
        timeout: seconds for each strategy.
        retry: statuses of finished entries that are tried again.
        progress: show a progress bar.
        examine: what a worker does with a job; another one in tests.

    Raises:
        ConfigError: a status is none, or `out` holds something else.
        CheckpointError: `out` cannot be written.
    """
    for status in retry:
        if status not in get_args(Status):
            raise ConfigError(
                f"--retry must be one of {', '.join(get_args(Status))}, got {status!r}"
                f"{did_you_mean(status, get_args(Status)) or '.'}"
            )
    check_place(out)
    finished = {key: entry for key, entry in read_entries(out).items() if entry.status not in retry}
    open_jobs = deque(_open(jobs, finished))
    total = sum(len(job.strategies) for job in jobs)
    left = sum(len(job.strategies) for job in open_jobs)
    now = versions()
    counts = Counter(finished[key].status for job in jobs for key in _keys(job) if key in finished)
    bar = tqdm(total=total, initial=total - left, desc="support", unit="entry", disable=not progress)

    def record(job: Job, strategy: str, outcome: Outcome, seconds: float) -> None:
        model = TASKS[job.task].classes.get(job.architecture, "")
        entry = Entry(job.task, job.architecture, model, strategy, outcome.status, outcome.note, round(seconds, 2), now)
        append_entries(out, [entry])
        finished[entry.key] = entry
        counts[entry.status] += 1
        bar.update()
        bar.set_postfix_str(", ".join(f"{count} {status}" for status, count in counts.most_common()))

    crew = [_start(examine) for _ in range(min(workers, len(open_jobs)))]
    try:
        while crew:
            for worker in crew:
                if worker.job is None:
                    _give(worker, open_jobs.popleft() if open_jobs else None, timeout)
            crew = [worker for worker in crew if worker.job is not None]
            crew = [_attend(worker, record, timeout, open_jobs, examine) for worker in _awaited(crew)]
    finally:
        for worker in crew:
            worker.process.kill()
        bar.close()
    return [finished[key] for job in jobs for key in _keys(job)]


def _matching(names: Iterable[str], patterns: Sequence[str], rule: str) -> list[str]:
    names = list(names)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise NothingToCompressError(
                f"{rule} of the matrix, got {pattern!r}{did_you_mean(pattern, names) or '.'} "
                f"There are: {', '.join(sorted(names))}."
            )
    return [name for name in names if not patterns or any(fnmatchcase(name, pattern) for pattern in patterns)]


def _open(jobs: Sequence[Job], finished: dict[tuple[str, str, str], Entry]) -> Iterable[Job]:
    for job in jobs:
        left = tuple(key[2] for key in _keys(job) if key not in finished)
        if left:
            yield Job(job.task, job.architecture, left)


def _keys(job: Job) -> list[tuple[str, str, str]]:
    return [(job.task, job.architecture, strategy) for strategy in job.strategies]


def _start(examine: Examine) -> _Worker:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=serve, args=(theirs, examine), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _give(worker: _Worker, job: Job | None, timeout: float) -> None:
    """Hand a job to an idle worker, or send it home."""
    worker.job = job
    worker.waiting = list(job.strategies) if job is not None else []
    worker.deadline = time.monotonic() + timeout + (_START_SECONDS if worker.fresh else 0.0)
    try:
        worker.connection.send(job)
    except OSError:  # it died between two jobs; the closed pipe is seen when it is attended to
        return


def _awaited(crew: list[_Worker]) -> list[_Worker]:
    """Wait until a worker says something, dies, or has had its time; return the crew."""
    if crew:
        soonest = min(worker.deadline for worker in crew)
        wait([worker.connection for worker in crew], timeout=max(soonest - time.monotonic(), 0.0))
    return crew


def _attend(
    worker: _Worker,
    record: Callable[[Job, str, Outcome, float], None],
    timeout: float,
    open_jobs: deque[Job],
    examine: Examine,
) -> _Worker:
    """Take what a worker has said; put a new one in the place of one that died or hangs."""
    assert worker.job is not None
    ended = ""
    try:
        while worker.waiting and worker.connection.poll():
            outcome, seconds = worker.connection.recv()
            record(worker.job, worker.waiting.pop(0), outcome, seconds)
            worker.fresh = False
            worker.deadline = time.monotonic() + timeout
    except (EOFError, OSError):
        worker.process.join()
        ended = f"its process ended with exit code {worker.process.exitcode}"
    if worker.waiting and not ended and time.monotonic() >= worker.deadline:
        ended = f"no answer within {timeout:g} s"
    if not ended:
        worker.job = worker.job if worker.waiting else None
        return worker
    worker.process.kill()
    record(worker.job, worker.waiting.pop(0), Outcome("failed", ended), timeout)
    if worker.waiting:
        open_jobs.appendleft(Job(worker.job.task, worker.job.architecture, tuple(worker.waiting)))
    return _start(examine)
