"""Whose turn it is: strategies that change a model one block at a time say when a block begins and when it is done.

For a model in memory this is a loop over its layers and nothing more. Where a keeper stands behind the model (as
`lc.compress_checkpoint` puts one there), the block's weights come from disk when its turn begins and are written when
it is done, and blocks that an earlier, interrupted run finished are put back instead of being worked on again.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Container, Iterable, Iterator
from typing import TYPE_CHECKING, Protocol

from .stacks import find_stacks

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from .layers import WeightLayer

_KEEPER = "_llmcompress_keeper"
_MAPPING = "_llmcompress_mapping"
# Linux since 5.4: give back the pages that are as in the file, keep those that were written to.
_PAGEOUT = 21


class Keeper(Protocol):
    """Brings the weights of blocks and keeps them; `""` stands for all that is in no block."""

    def is_finished(self, block: str) -> bool:
        """Whether an earlier run finished the block."""

    def begin(self, block: str) -> None:
        """Bring the block's weights; they stay until it is finished."""

    def restore(self, block: str) -> None:
        """Put what the earlier run made of the block in its place."""

    def finish(self, block: str) -> None:
        """Keep what the block has become."""


class _Memory:
    """The keeper of a model that is in memory: there is nothing to do."""

    def is_finished(self, block: str) -> bool:
        return False

    def begin(self, block: str) -> None: ...

    def restore(self, block: str) -> None: ...

    def finish(self, block: str) -> None: ...


def keeper_of(model: nn.Module) -> Keeper:
    """Return who keeps the weights of `model`."""
    keeper: Keeper = vars(model).get(_KEEPER) or _Memory()
    return keeper


def set_keeper(model: nn.Module, keeper: Keeper | None) -> None:
    """Put `keeper` behind `model`, or take away the one there is."""
    if keeper is None:
        vars(model).pop(_KEEPER, None)
    else:
        vars(model)[_KEEPER] = keeper


def in_turns(model: PreTrainedModel, layers: Iterable[WeightLayer]) -> Iterator[tuple[str, list[WeightLayer]]]:
    """Group `layers` by their block, in the order of the model; what is in no block comes last, under `""`.

    While a group is out, its weights (and nothing else of the model) may be changed or replaced; when the next one is
    asked for, they are final.

    Example:
        >>> from llmcompress.anatomy.layers import weight_layers
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("gpt2")
        >>> [(block, len(layers)) for block, layers in in_turns(model, weight_layers(model))]
        [('transformer.h.0', 4), ('transformer.h.1', 4), ('', 3)]
    """
    keeper = keeper_of(model)
    for block, own in _groups(model, layers).items():
        if keeper.is_finished(block):
            keeper.restore(block)
            continue
        keeper.begin(block)
        yield block, own
        keeper.finish(block)


def let_go(weight: torch.Tensor) -> None:
    """Tell that `weight` was read outside of its turn, and is not needed for now: a mapped file gives its pages back.

    Changes nothing. For whoever reads all weights of a model in a row: without it they stay in memory for as long as
    nothing else needs it.
    """
    mapping = getattr(weight, _MAPPING, None)
    if mapping is not None and sys.platform == "linux":
        try:
            mapping.madvise(_PAGEOUT)
        except OSError:
            return  # an older kernel, which takes the pages back by itself when memory is short


def set_mapping(weight: torch.Tensor, mapping: mmap.mmap | None) -> None:
    """Note which mapped file `weight` lies in, for `let_go`; None where it lies in memory."""
    setattr(weight, _MAPPING, mapping)


def _groups(model: PreTrainedModel, layers: Iterable[WeightLayer]) -> dict[str, list[WeightLayer]]:
    blocks = [stack.block_path(index) for stack in find_stacks(model) for index in range(len(stack))]
    groups: dict[str, list[WeightLayer]] = {path: [] for path in [*blocks, ""]}
    for layer in layers:
        groups[block_of(layer.path, groups)].append(layer)
    return {path: own for path, own in groups.items() if own}


def block_of(path: str, blocks: Container[str]) -> str:
    """Return which of `blocks` the module at `path` is in, or `""`.

    Example:
        >>> block_of("h.1.attn.c_attn", {"h.0", "h.1"}), block_of("wte", {"h.0", "h.1"})
        ('h.1', '')
    """
    parents = path.split(".")
    paths = (".".join(parents[:length]) for length in range(1, len(parents) + 1))
    return next((path for path in paths if path in blocks), "")
