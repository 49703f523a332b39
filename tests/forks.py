"""Children of a test that die on the way: forked, since a fresh process takes seconds to import what they need."""

import os
from collections.abc import Callable

import pytest
import torch

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork of this process")


def wait_status(work: Callable[[], object]) -> int:
    """Do `work` in a forked child, and return how the child ended, as `os.waitpid` tells it."""
    return os.waitpid(begun(work), 0)[1]


def begun(work: Callable[[], object]) -> int:
    """Begin `work` in a forked child, and return the child's number."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # the threads of the parent are none of the child's, which would wait for them
        try:
            work()
        finally:
            os._exit(0)
    return process
