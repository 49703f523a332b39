"""Several models taking turns, so that what the machine does meanwhile hits all of them alike, and their ratios."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, Field
from tqdm.auto import tqdm

from ..errors import ConfigError
from .statistics import median_interval

FEWEST_ROUNDS = 6
"""With fewer, the order statistics give no interval of the median at the 95 % level."""


class Ratio(BaseModel, frozen=True, extra="forbid"):
    """How many times faster than the base, from turns taken side by side."""

    ratio: float = Field(description="time of the base over time of the candidate, the median over all rounds")
    low: float = Field(description="lower end of its 95 % interval")
    high: float = Field(description="upper end of its 95 % interval")


def check_seconds(seconds: Any) -> None:
    """Refuse what is no time.

    Raises:
        ConfigError: naming what it is.
    """
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not number or not 0 <= seconds < float("inf"):
        raise ConfigError(f"seconds must be a number in [0, inf), got {seconds!r}.")


def take_turns(
    turn: Callable[[str], None], names: Sequence[str], *, seconds: float, title: str, progress: bool
) -> None:
    """Call `turn` with each name in rounds: there and back again (ABBA), for `seconds`, at least `FEWEST_ROUNDS`.

    There and back cancels a drift that is linear in time. Who begins is drawn anew in each round: of two equal models
    either is then as likely to meet a neighbour's burst, however long bursts last, and the sign of a round's log-ratio
    is a fair coin. The interval of `ratio_of` asks for no more than that.

    Args:
        turn: measures one model.
        names: of the models.
        seconds: for each of the models.
        title: of the progress bar.
        progress: whether it is shown.
    """
    # Of its own: measuring must not move the caller's random numbers. Unseeded: nothing could be reproduced anyway.
    chance = random.Random()
    budget = seconds * len(names)
    layout = "{l_bar}{bar}| {elapsed}<{remaining}"
    begin, rounds = time.perf_counter(), 0
    with tqdm(total=1.0, desc=title, disable=not progress, leave=False, bar_format=layout) as bar:
        while rounds < FEWEST_ROUNDS or time.perf_counter() - begin < budget:
            order = chance.sample(list(names), len(names))
            for name in (*order, *reversed(order)):
                turn(name)
            rounds += 1
            spent = (time.perf_counter() - begin) / budget if budget else 1.0
            bar.update(min(spent, rounds / FEWEST_ROUNDS, 1.0) - bar.n)


def ratio_of(base: Sequence[float], candidate: Sequence[float]) -> Ratio:
    """Compare the turns of two models that took them together, two turns a round.

    The interval is that of a median from order statistics: it inverts the sign test over rounds, so that outliers and
    the distribution of times do not matter.

    Raises:
        ConfigError: the models did not take turns together.

    Example:
        >>> ratio_of([2.0, 4.0, 3.0, 3.0], [1.0, 2.0, 1.0, 1.0]).ratio
        2.5
    """
    if len(base) != len(candidate) or len(base) % 2 or not base:
        raise ConfigError(
            f"base and candidate must be timed together, got {len(base)} and {len(candidate)} turns; "
            "measure both in one call."
        )
    times = (np.asarray(turns).reshape(-1, 2).sum(1) for turns in (base, candidate))
    ratios = np.divide(*times).tolist()
    low, high = median_interval(ratios)
    return Ratio(ratio=statistics.median(ratios), low=low, high=high)
