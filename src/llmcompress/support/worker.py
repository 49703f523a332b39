"""What a worker process does: one job after the other, each strategy's outcome told as soon as it is known.

Nothing heavy is imported here: what a job takes, its work brings along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

Status = Literal["verified", "refused", "failed", "absent", "not built"]


@dataclass(frozen=True)
class Job:
    """One architecture, with the strategies that are still to be tried on it.

    Attributes:
        task: key of the task.
        architecture: the `model_type`.
        strategies: names, in the order in which they are tried.
    """

    task: str
    architecture: str
    strategies: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What came out for one strategy on one architecture.

    Attributes:
        status: `verified`; `refused` with a reason; `failed`: another exception, or a wrong result; `absent`: the model
            has no such part; `not built`: there is no tiny model to try it on.
        note: the reason, or a remark.
    """

    status: Status
    note: str = ""


Examine = Callable[[Job], Iterator[Outcome]]
"""Yields one outcome for each strategy of a job, in order."""


def serve(connection: Connection, examine: Examine) -> None:
    """Work on jobs that come through `connection` until None does; send (outcome, seconds) for each strategy."""
    while (job := connection.recv()) is not None:
        start = time.perf_counter()
        for outcome in examine(job):
            connection.send((outcome, time.perf_counter() - start))
            start = time.perf_counter()
