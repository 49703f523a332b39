"""In which order rows are trained on: those of like length together, anew each epoch, the same after a restart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices


class LikeLengths(Sampler[int]):
    """Row numbers such that a global batch holds rows of like length, so that little is padded.

    The order depends on seed and epoch alone: every process draws the same one whatever its dropout took from the
    global source of chance, and a run that was interrupted in an epoch continues in the same order.

    Args:
        lengths: tokens of each row.
        size: rows of a global batch.
        seed: of the order.

    Example:
        >>> order = LikeLengths([1, 5, 2, 6, 1, 5], size=2, seed=0)
        >>> first = list(order)
        >>> sorted(first) == list(range(6)) and first == list(order)
        True
        >>> order.set_epoch(1)
        >>> first != list(order)
        True
    """

    def __init__(self, lengths: Sequence[int], *, size: int, seed: int) -> None:
        self._lengths, self._size, self._seed, self._epoch = list(lengths), size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of this epoch from now on."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._size, generator=generator))
