"""One architecture tried in a worker process: its tiny model is built once, and each strategy works on a copy."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator

import torch
from transformers.utils import logging

from .checks import Subject, check
from .tiny_models import NotBuiltError, build_tiny
from .worker import Job, Outcome


def examine(job: Job) -> Iterator[Outcome]:
    """Build the tiny model of a job, and yield what comes out for each strategy. Silences the process it runs in."""
    _hush()
    try:
        subject = Subject.of(build_tiny(job.task, job.architecture))
    except NotBuiltError as error:
        yield from (Outcome("not built", str(error)) for _ in job.strategies)
        return
    for strategy in job.strategies:
        yield check(strategy, subject)


def _hush() -> None:
    """One thread, and nothing that hundreds of models say on the screen."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
