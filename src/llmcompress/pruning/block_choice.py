"""Which sets of blocks may stay: all of one size, or those that a config can tell, such as every second one's kind."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from ..anatomy.depth import plan_depth
from ..anatomy.stacks import Stack
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Kind = tuple[Any, ...]


@dataclass(frozen=True)
class Choice:
    """What may stay of one stack.

    Attributes:
        stack: the stack.
        keep: how many blocks stay.
        kinds: what each block of the deep stack is; equal for blocks that could take each other's place.
        pattern: the kinds that the blocks kept must have, in order; None where any may stay.
    """

    stack: Stack
    keep: int
    kinds: tuple[_Kind, ...]
    pattern: tuple[_Kind, ...] | None

    def dearest(self, scores: Sequence[float], without: Collection[int] = ()) -> tuple[int, ...] | None:
        """Return the legal blocks of the highest total score, or None where there is no legal choice.

        Args:
            scores: what it is worth to keep each block, finite.
            without: blocks that must go.

        Example:
            >>> stack = Stack("layers", nn.ModuleList([nn.Identity() for _ in range(4)]))
            >>> Choice(stack, 2, ("a", "b", "a", "b"), None).dearest([1, 0, 3, 2])
            (2, 3)
            >>> Choice(stack, 2, ("a", "b", "a", "b"), ("a", "b")).dearest([1, 0, 3, 2], without=[3])
            (0, 1)
        """
        # table[j] is the best choice for the first j of the pattern among the blocks seen so far.
        table: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ()), *[None] * self.keep]
        for index, kind in enumerate(self.kinds):
            if index in without:
                continue
            for place in reversed(range(min(index + 1, self.keep))):
                before, best = table[place], table[place + 1]
                if before is None or (self.pattern is not None and self.pattern[place] != kind):
                    continue
                total = before[0] + scores[index]
                if best is None or total > best[0]:
                    table[place + 1] = total, (*before[1], index)
        found = table[self.keep]
        return None if found is None else found[1]


def legal_choice(model: PreTrainedModel, stack: Stack, keep: int) -> Choice:
    """Find out which `keep` blocks of `stack` may stay. Reads no weight.

    Raises:
        UnsupportedModelError: no choice of so many blocks is known that a plain config tells.

    Example:
        >>> from llmcompress.anatomy.stacks import find_stacks
        >>> from llmcompress.testing import tiny_model
        >>> t5 = tiny_model("t5")  # only the first block holds the position bias
        >>> legal_choice(t5, find_stacks(t5)[0], 1).dearest([1.0, 2.0])
        (0,)
    """
    kinds = _kinds(stack)
    depth = len(stack)
    prefix = tuple(range(keep))
    if len(set(kinds)) == 1:
        plan_depth(model, {stack.path: prefix})
        return Choice(stack, keep, kinds, None)
    # Kinds may stand in the config block by block (`layer_types`), or be fixed by the place. As many as can be of the
    # first block's kind, or of the others: where both are legal, any choice is.
    like_first = sorted(range(depth), key=lambda index: kinds[index] != kinds[0])
    trials = [tuple(sorted(like_first[:keep])), tuple(sorted(like_first[depth - keep :]))]
    if all(_is_legal(model, stack, trial) for trial in trials):
        return Choice(stack, keep, kinds, None)
    ends = (*range(keep - 1), depth - 1)
    for pattern in (prefix, ends, tuple(range(depth - keep, depth))):
        if _is_legal(model, stack, pattern):
            return Choice(stack, keep, kinds, tuple(kinds[index] for index in pattern))
    plan_depth(model, {stack.path: prefix})
    raise AssertionError("unreachable: the first blocks are no legal choice")


def _is_legal(model: PreTrainedModel, stack: Stack, kept: tuple[int, ...]) -> bool:
    try:
        plan_depth(model, {stack.path: kept})
    except UnsupportedModelError:
        return False
    return True


def _kinds(stack: Stack) -> tuple[_Kind, ...]:
    """Return for each block its classes, shapes and plain attributes, but for those that only number the blocks."""
    plain = [_plain(block) for block in stack.blocks]
    # `layer_idx` and its like; a mixed stack may have them in some of its blocks only.
    numbers = {
        name
        for name in set().union(*plain)
        if all(type(own[name]) is int and own[name] == index for index, own in enumerate(plain) if name in own)
    }
    return tuple(
        (
            tuple((path, type(module)) for path, module in block.named_modules()),
            tuple((name, tuple(tensor.shape)) for name, tensor in block.state_dict().items()),
            tuple(sorted((name, value) for name, value in attributes.items() if name not in numbers)),
        )
        for block, attributes in zip(stack.blocks, plain, strict=True)
    )


def _plain(block: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": value
        for path, module in block.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, (bool, int, float, str)) and name != "training"
    }


def early_and_last(choice: Choice) -> list[float]:
    """Return what each block is worth by the simple rule: the earlier the more, and the very last one the most.

    One block alone is the first.
    """
    of = len(choice.stack)
    return [*(float(of - index) for index in range(of - 1)), float(of + 1 if choice.keep > 1 else 0)]


def deviation(choice: Choice, scores: Sequence[float]) -> str | None:
    """Return a remark where the legal choice is not the one of the highest scores."""
    wish = Choice(choice.stack, choice.keep, choice.kinds, None).dearest(scores)
    if wish is None or wish == choice.dearest(scores):
        return None
    would = ", ".join(map(str, complement(wish, len(choice.stack))))
    return f"by the criterion {would} would go, which leaves blocks that cannot stand alone; this is the nearest choice"


def complement(indices: Collection[int], of: int) -> tuple[int, ...]:
    """Return the indices below `of` that are not among `indices`."""
    return tuple(index for index in range(of) if index not in indices)
