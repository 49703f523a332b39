"""Kernels in C++, chosen at run time by what the processor has; without them all is computed in torch."""

from .activations import code_rows
from .library import SETS, Native, NotBuilt, load, native, why_absent

__all__ = ["SETS", "Native", "NotBuilt", "code_rows", "load", "native", "why_absent"]
