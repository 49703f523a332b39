"""Kernels in C++, chosen at run time by what the processor has; without them all is computed in torch."""

from .activations import code_rows
from .between import Gate, activate, layer_norm, rms_norm
from .chain import Chain, ProductStep, RunningChain
from .expected import expect
from .library import SETS, Native, NotBuilt, load, native, why_absent
from .packed_product import NativeProduct, activation_limit, codebook_steps

__all__ = [
    "SETS",
    "Chain",
    "Gate",
    "Native",
    "NativeProduct",
    "NotBuilt",
    "ProductStep",
    "RunningChain",
    "activate",
    "activation_limit",
    "code_rows",
    "codebook_steps",
    "expect",
    "layer_norm",
    "load",
    "native",
    "rms_norm",
    "why_absent",
]
