"""Engines in a process of their own each, so that none inherits another's threads, memory pool or settings."""

from __future__ import annotations

import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from _turns import Times, by_lot

Maker = Callable[[int], Callable[[Any], object]]
"""Makes an engine, given the threads it may use; a function of a module, since it travels by name."""

# Threads of the engine before may still spin for some milliseconds, in wait for more work.
_SETTLED = 0.02


class Worker:
    """One engine in its process.

    Args:
        maker: makes it there.
        threads: of a product.

    Raises:
        ImportError: when the engine needs a package that is not installed.
    """

    def __init__(self, maker: Maker, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        self._process = context.Process(target=_serve, args=(maker, threads, far), daemon=True)
        self._process.start()
        far.close()
        missing = self._pipe.recv()
        if missing is not None:
            raise ImportError(missing)

    def milliseconds(self, given: Any) -> float:
        """Return the time of one pass, behind one that is not timed."""
        time.sleep(_SETTLED)
        self._pipe.send(given)
        return float(self._pipe.recv())

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.join()


def _serve(maker: Maker, threads: int, pipe: Connection) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine = maker(threads)
    except ImportError as error:
        return pipe.send(str(error))
    pipe.send(None)
    with torch.inference_mode():
        while True:
            given = pipe.recv()
            engine(given)
            start = time.perf_counter()
            engine(given)
            pipe.send(1000 * (time.perf_counter() - start))


@contextmanager
def workers(makers: dict[str, Maker], threads: int) -> Iterator[dict[str, Worker]]:
    """Start a process for each engine; print which cannot run here, and why."""
    started: dict[str, Worker] = {}
    try:
        for name, maker in makers.items():
            try:
                started[name] = Worker(maker, threads)
            except ImportError as error:
                print(f"- not run: {name}: {error}")
        yield started
    finally:
        for worker in started.values():
            worker.close()


def in_turn(engines: dict[str, Worker], given: Any, rounds: int) -> Times:
    """Time every engine with `given` in each round."""
    return by_lot({name: worker.milliseconds for name, worker in engines.items()}, given, rounds)
