"""What the layers of a model get as inputs on real texts: in one dense pass, or one block at a time.

A strategy asks for batches, says which layers it wants to know about and what to add up of their inputs, and gets the
sums; it never calls a block, builds a mask or holds activations itself.
"""

from __future__ import annotations

from .batches import calibration_batches
from .blocks import Turn, block_by_block, observe
from .hessian import inverse_root
from .statistics import InputNorms, InputProducts, Statistic

__all__ = [
    "InputNorms",
    "InputProducts",
    "Statistic",
    "Turn",
    "block_by_block",
    "calibration_batches",
    "inverse_root",
    "observe",
]
