"""Where the workers of a sweep run: here, in processes beside this one, under a launcher, on a Ray cluster."""

from __future__ import annotations

import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import Literal

from ..errors import CompressionError, MissingInputError
from ..processes import launched
from .work import Run, work_alone

Where = Literal["processes", "ray"]

_WORKER = "import sys; from llmcompress.sweeping.work import work_alone; work_alone(*sys.argv[1:])"


@dataclass(frozen=True)
class Team:
    """The processes that do a sweep together because a launcher started all of them; or this one alone.

    Attributes:
        name: of the run, the same in all of them.
        leads: whether this one writes what is to be done, and compares what was made.
    """

    name: str
    leads: bool

    @classmethod
    def meet(cls) -> Team:
        """Agree on a name."""
        name = [uuid.uuid4().hex[:12]]
        if not launched():
            return cls(name[0], leads=True)
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(name)
        return cls(name[0], leads=PartialState().is_main_process)

    def wait(self) -> None:
        """Wait until all have come here."""
        if launched():
            from accelerate import PartialState

            PartialState().wait_for_everyone()


def launch(run: Run, workers: int, on: Where) -> None:
    """Have so many workers, in other processes, do the jobs of a run, and wait for them.

    Args:
        run: what is to be done, written.
        workers: how many. A process that a launcher started has one beside it.
        on: "processes" of this machine, or the workers of a "ray" cluster, which see the same folder.

    Raises:
        CompressionError: a worker died; what it had finished is kept.
        MissingInputError: Ray is not installed.
    """
    if on == "ray":
        _on_ray(run, workers)
    else:
        # Steps would take a launched process for one of several that train one model together.
        _beside(run, 1 if launched() else workers)


def _beside(run: Run, workers: int) -> None:
    command = [sys.executable, "-c", _WORKER, str(run.folder), run.name]
    started = [subprocess.Popen(command, stdin=subprocess.DEVNULL) for _ in range(workers)]
    try:
        codes = [process.wait() for process in started]
    except BaseException:
        for process in started:
            process.kill()
        raise
    if any(codes):
        raise CompressionError(
            f"a worker of the sweep ended with exit status {next(code for code in codes if code)}, see its output "
            f"above; run the sweep again with the same folder, what is finished is kept in {run.folder}."
        )


def _on_ray(run: Run, workers: int) -> None:
    try:
        import ray
    except ImportError:
        raise MissingInputError("sweep(on='ray') needs Ray; pip install llmcompress[ray].") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    # A task asks for one core: how many threads it may take is the sweep's to say.
    remote = ray.remote(work_alone).options(max_retries=0)
    try:
        ray.get([remote.remote(str(run.folder), run.name) for _ in range(workers)])
    except ray.exceptions.RayError as error:
        raise CompressionError(
            f"a worker of the sweep failed on Ray: {str(error).strip().splitlines()[-1]}; run the sweep again with the "
            f"same folder, what is finished is kept in {run.folder}."
        ) from error
