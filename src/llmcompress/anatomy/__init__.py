"""What a model is made of: blocks, layers, ties, sizes; and the surgery on them."""

from .find import anatomy
from .footprint import Footprint, footprint
from .parts import Anatomy, Attention, Block, Experts, FeedForward, Projection

__all__ = ["Anatomy", "Attention", "Block", "Experts", "FeedForward", "Footprint", "Projection", "anatomy", "footprint"]
