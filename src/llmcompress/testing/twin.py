"""The dense twin of a cut model: the original at full size, with all that the history calls cut doing nothing.

What a structural step returns must give exactly its outputs. The twin is made from the history alone, so it checks what
the step says it kept as well.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch

from ..anatomy import anatomy
from ..anatomy.coupling import expert_groups, feed_forward_groups, head_groups, query_head_groups
from ..anatomy.groups import Group, Kind
from ..anatomy.masking import masked
from ..anatomy.residual import residual_group
from ..compressor import Cut
from ..pruning.bypass import bypassed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def masked_twin(model: PreTrainedModel, history: Sequence[Cut]) -> Iterator[PreTrainedModel]:
    """Yield a copy of `model` in which the channels, heads, experts and blocks that `history` lost do nothing.

    Args:
        model: the model before the step; not changed.
        history: the cuts of one step.

    Example:
        >>> import torch
        >>> import llmcompress as lc
        >>> from llmcompress.anatomy.probe import probe_outputs
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model, context = tiny_model("bert"), lc.Context()
        >>> pruned = lc.StructuredPruning(ffn=0.5).compress(tiny_model("bert"), context)
        >>> with masked_twin(model, context.history) as twin:
        ...     outputs = [probe_outputs(each, tiny_inputs(model)) for each in (pruned, twin)]
        >>> torch.allclose(*outputs, atol=1e-5)
        True
    """
    twin = copy.deepcopy(model)
    with ExitStack() as stack:
        stack.enter_context(masked(twin, cuts_of(twin, history)))
        for entry in history:
            if entry.axis == "layers":
                gone = sorted(set(range(entry.of)) - set(entry.kept))
                stack.enter_context(bypassed(twin, [f"{entry.path}.{index}" for index in gone]))
        yield twin


def cuts_of(model: PreTrainedModel, history: Sequence[Cut]) -> list[tuple[Group, torch.Tensor]]:
    """Return the groups of `model` that `history` cut, each with the channels it kept, as `cut` and `masked` take them.

    Raises:
        AssertionError: the history names a group that the model does not have.
    """
    kept = {(entry.path, entry.axis): torch.tensor(entry.kept) for entry in history if entry.axis != "layers"}
    axes = {axis for _, axis in kept}
    found: list[tuple[Group, torch.Tensor]] = []
    for kind in ("ffn", "heads", "query_heads", "experts", "hidden"):
        for group in _groups(model, kind) if kind in axes else ():
            names = [f"{group.path}.{i}" for i in range(group.experts)] if group.experts else [group.path]
            rows = [kept.pop((name, kind), None) for name in names]
            present = [row for row in rows if row is not None]
            if present:
                assert len(present) == len(rows), f"the history tells only some experts of {group.path}"
                found.append((group, torch.stack(present) if group.experts else present[0]))
    assert not kept, f"the history names what {type(model).__name__} does not have: {sorted(kept)}"
    return found


def _groups(model: PreTrainedModel, kind: Kind) -> list[Group]:
    body = anatomy(model)
    if kind == "ffn":
        return feed_forward_groups(body)
    if kind == "heads":
        return head_groups(model, body)
    if kind == "query_heads":
        return query_head_groups(model, body)
    if kind == "experts":
        return expert_groups(model, body)
    return [residual_group(model, body)]
