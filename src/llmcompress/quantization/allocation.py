"""Which layer gets how many bits: least damage in all within an average of stored bits a weight, solved exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import CompressionError, ConfigError

# Of the least possible damage; closing the last of a gap can take longer than all the rest.
_GAP = 1e-4
_SECONDS = 60


@dataclass(frozen=True)
class Choice:
    """What a layer may become.

    Attributes:
        bits: of a code.
        stored: bits a weight with scales and zero points.
        damage: nats.
    """

    bits: int
    stored: float
    damage: float


def allocate(choices: Mapping[str, Sequence[Choice]], weights: Mapping[str, int], target: float) -> dict[str, int]:
    """Choose one of each layer's `choices`, so that the damages add up to the least.

    A knapsack with one item of each kind, solved as a mixed-integer linear program (HiGHS, by `scipy.optimize.milp`) to
    within 0.01 % of the optimum.

    Args:
        choices: by layer, at least one each.
        weights: by layer, how many weights it has.
        target: the most stored bits a weight, averaged over all weights.

    Returns:
        Bits by layer.

    Raises:
        ConfigError: even the smallest choices are above `target`.

    Example:
        >>> both = [Choice(2, 2.5, 1.0), Choice(8, 8.5, 0.0)]
        >>> allocate({"a": both, "b": [Choice(2, 2.5, 0.1), Choice(8, 8.5, 0.0)]}, {"a": 10, "b": 10}, 5.5)
        {'a': 8, 'b': 2}
    """
    total = sum(weights.values())
    least = sum(min(one.stored for one in own) * weights[name] for name, own in choices.items()) / total
    if least > target + 1e-9:
        raise ConfigError(
            f"target_bits must be at least {least:.4g} here, got {target:g}: the fewest bits take so many with scales "
            f"and zero points; allow fewer bits, or take a larger group_size."
        )
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    flat = [(row, name, one) for row, (name, own) in enumerate(choices.items()) for one in own]
    damage = np.array([one.damage for _, _, one in flat])
    share = np.array([one.stored * weights[name] / total for _, name, one in flat])
    rows = np.array([row for row, _, _ in flat])
    once = csr_array((np.ones(len(flat)), (rows, np.arange(len(flat)))), shape=(len(choices), len(flat)))
    found = milp(
        # The solver's tolerances are absolute: damages are brought near 1.
        damage / (damage.max() or 1.0),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(share[None], -np.inf, max(target, least))],
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
    )
    if found.x is None:
        raise CompressionError(f"no allocation of bits was found: {found.message}")
    taken = [(name, one.bits) for value, (_, name, one) in zip(found.x, flat, strict=True) if value > 0.5]
    return dict(taken)
