"""The ways in which weights are stored, by the name that a folder's config knows."""

from __future__ import annotations

from .expert_modules import Int8Experts
from .modules import Int8Embedding, Int8Linear, QuantizedModule
from .packed_experts import PackedExperts
from .packed_modules import PackedEmbedding, PackedLinear
from .static_modules import Int8StaticLinear

SCHEMES: dict[str, type[QuantizedModule]] = {
    cls.scheme: cls
    for cls in (
        Int8Linear,
        Int8Embedding,
        Int8Experts,
        Int8StaticLinear,
        PackedLinear,
        PackedEmbedding,
        PackedExperts,
    )
}
"""A new way to store weights is one class and one entry here."""
