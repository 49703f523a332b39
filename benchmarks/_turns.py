"""Engines timed in turns, so that a busy machine slows all of them alike; what counts is the ratio of the medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

_WARM_UP = 2

Name = TypeVar("Name")
Times = dict[str, list[float]]
"""Milliseconds of each round, by engine."""


def take_turns(engines: Mapping[str, Callable[[Any], object]], given: Any, rounds: int) -> Times:
    """Call every engine with `given` in each round."""

    def timed(engine: Callable[[Any], object]) -> Callable[[Any], float]:
        def milliseconds(given: Any) -> float:
            # Untimed first: the threads of the engine before may still spin, and its weights fill the caches.
            engine(given)
            start = time.perf_counter()
            engine(given)
            return 1000 * (time.perf_counter() - start)

        return milliseconds

    return by_lot({name: timed(engine) for name, engine in engines.items()}, given, rounds)


def by_lot(engines: Mapping[Name, Callable[[Any], float]], given: Any, rounds: int) -> dict[Name, list[float]]:
    """Collect the milliseconds that every engine says it took for `given`, in each round."""
    times: dict[Name, list[float]] = {name: [] for name in engines}
    order = random.Random(0)
    for round_ in range(rounds + _WARM_UP):
        # By lot: in a fixed order each engine would always meet the caches and the clock that one other leaves behind.
        for name in order.sample(list(engines), len(engines)):
            took = engines[name](given)
            if round_ >= _WARM_UP:
                times[name].append(took)
    return times


def cell(own: Sequence[float], first: float) -> str:
    """Return a median [10th, 90th percentile] and how much faster it is than `first`."""
    low, *_, high = statistics.quantiles(own, n=10)
    return f"{statistics.median(own):.1f} [{low:.1f}, {high:.1f}] {first / statistics.median(own):.2f}x"


def print_table(columns: Mapping[str, Times]) -> None:
    """Print a Markdown row for each engine: median [10th, 90th percentile] and speed relative to the first engine."""
    engines: Sequence[str] = list(next(iter(columns.values())))
    print(f"| engine | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for name in engines:
        cells = []
        for times in columns.values():
            cells.append(cell(times[name], statistics.median(times[engines[0]])))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
