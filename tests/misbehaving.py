"""A support-matrix worker's work without any model: some architectures hang, and some kill the process."""

import os
import time

from llmcompress.support.worker import Outcome


def misbehave(job):
    for strategy in job.strategies:
        if (job.architecture, strategy) == ("hangs", "b"):
            time.sleep(3600)
        if (job.architecture, strategy) == ("dies", "b"):
            os._exit(7)
        yield Outcome("verified", f"by {os.getpid()}")
