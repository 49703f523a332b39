"""Where the products of quantized layers are computed: one file a scheme, each with a reference in plain torch."""

from .int8 import Activations, activation_bits, fbgemm_linear, has_fbgemm, pack, packed_bytes, torch_linear

__all__ = ["Activations", "activation_bits", "fbgemm_linear", "has_fbgemm", "pack", "packed_bytes", "torch_linear"]
