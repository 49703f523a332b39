"""How fast this machine multiplies and copies, measured in a fraction of a second: what rough times are made of."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from ..evaluation.latency import least_seconds

_SIDE = 512
_NUMBERS = 1 << 20
_SECONDS = 0.1


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second.

    Attributes:
        flops: of matrix products in float32.
        swept: numbers compared and written one by one.
    """

    flops: float
    swept: float


def machine_rates(device: str = "cpu") -> Rates:
    """Measure products of 512 x 512 and sweeps over a million numbers, once a process for a number of threads.

    Example:
        >>> rates = machine_rates()
        >>> rates.flops > 1e6, rates.swept > 1e5
        (True, True)
    """
    return _measured(device, torch.get_num_threads())


@functools.lru_cache(maxsize=16)
def _measured(device: str, threads: int) -> Rates:
    left = torch.randn(_SIDE, _SIDE, device=device)
    numbers = torch.randn(_NUMBERS, device=device)
    place = torch.device(device)
    product = least_seconds(lambda: left @ left, place, seconds=_SECONDS)
    sweep = least_seconds(lambda: torch.where(numbers.abs() < 1, 0.0, numbers), place, seconds=_SECONDS)
    return Rates(2 * _SIDE**3 / product, _NUMBERS / sweep)
