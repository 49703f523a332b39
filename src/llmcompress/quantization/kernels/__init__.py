"""Where the products of quantized layers are computed: one file a scheme, each with a reference in plain torch."""

from .int8 import (
    Activations,
    Stored,
    activation_bits,
    fbgemm_linear,
    has_int_mm,
    int_mm_linear,
    rounded_activations,
    torch_linear,
)
from .int8_native import Int8Weight
from .int8_ops import int8_linear, int8_static_linear, unpacked_linear
from .packed import Product, forget_product, packed_product, product_of, product_state, takes_packed_copy
from .packed_ops import packed_linear
from .packing import (
    PackedCopy,
    copies_codes,
    copy_state,
    forget_copy,
    has_fbgemm,
    identity,
    pack,
    packed_bytes,
    packed_copy,
    takes_copy,
)

__all__ = [
    "Activations",
    "Int8Weight",
    "PackedCopy",
    "Product",
    "Stored",
    "activation_bits",
    "copy_state",
    "fbgemm_linear",
    "forget_copy",
    "forget_product",
    "has_fbgemm",
    "has_int_mm",
    "identity",
    "int8_linear",
    "int8_static_linear",
    "int_mm_linear",
    "pack",
    "copies_codes",
    "packed_bytes",
    "packed_copy",
    "packed_linear",
    "packed_product",
    "product_of",
    "product_state",
    "rounded_activations",
    "takes_copy",
    "takes_packed_copy",
    "torch_linear",
    "unpacked_linear",
]
