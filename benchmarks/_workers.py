"""Engines in a process of their own each, so that none inherits another's threads, memory pool or settings.

With the command line of the scripts that time them in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import torch

from _machine import describe_machine
from _turns import Times, by_lot, print_table

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


def command_line(description: str | None, columns: str, default: str, told: str) -> argparse.Namespace:
    """Read the options, `--columns` among them under the name of what a column is.

    Args:
        description: of the script.
        columns: what the columns of the table are, in the plural.
        default: the columns, comma-separated.
        told: what they are, in words.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(f"--{columns}", default=default, help=f"{told}, comma-separated")
    parser.add_argument("--engines", default="", help="comma-separated part of the engines; all by default")
    return parser.parse_args()


def print_turns(
    title: str, makers: Mapping[str, Maker], columns: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    """Time engines in turns, each in its process, and print what the table is of and the table.

    Args:
        title: of the table.
        makers: of all engines, by name; the first is what the others are compared with.
        columns: what each engine is given, by the name of the column.
        arguments: from `command_line`.
    """
    threads, rounds = arguments.threads, arguments.rounds
    names = [name for name in arguments.engines.split(",") if name] or list(makers)
    print(f"# {title}\n\n{describe_machine()}")
    print(f"- threads of the engines: {threads}, each in a process of its own")
    print(f"- rounds: {rounds}, engines in turn, their order drawn anew each round", flush=True)
    with workers({name: make for name, make in makers.items() if name in names}, threads) as engines:
        print(f"\nMedian milliseconds a pass [10th, 90th percentile]; speed relative to {next(iter(engines))}.\n")
        print_table({column: in_turn(engines, given, rounds) for column, given in columns.items()})


def in_turn(engines: dict[str, Worker], given: Any, rounds: int) -> Times:
    """Time every engine with `given` in each round."""
    return by_lot({name: worker.milliseconds for name, worker in engines.items()}, given, rounds)
