"""Whether heads work each for itself, tried out: what one of them computes must not reach the others' places.

Some attentions subtract one head from another, or mix them. There a head that goes changes the others, so that no slice
equals a mask; this is found before anything is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .groups import Group, Member, tensor_of
from .probe import probe_inputs, probe_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def independent(model: PreTrainedModel, groups: Sequence[Group]) -> tuple[list[Group], dict[str, str]]:
    """Return those of `groups` (heads) whose channels work each for itself, and by path why the others are left alone.

    Two passes of a few tokens for each class of attention: in the second, what head 0 projects has other signs. At the
    places of the other heads nothing may change but one factor for each token, which a norm over all heads brings.
    Without weights nothing is tried.

    Raises:
        UnsupportedModelError: all are left alone.

    Example:
        >>> from llmcompress.anatomy import anatomy
        >>> from llmcompress.anatomy.coupling import head_groups
        >>> from llmcompress.testing import tiny_model
        >>> model = tiny_model("llama")
        >>> free, left = independent(model, head_groups(model, anatomy(model)))
        >>> len(free), left
        (2, {})
    """
    found: dict[tuple[object, ...], str | None] = {}
    free, left = [], {}
    for group in groups:
        reasons = [_why_bound(model, group, scope, found) for scope in group.scopes]
        reason = next(filter(None, reasons), None)
        if reason is None:
            free.append(group)
        else:
            left[group.path] = reason
    if not free:
        path, reason = next(iter(left.items()))
        raise UnsupportedModelError(
            f"{groups[0].kind} of {type(model).__name__} cannot be pruned: in {path} {reason}; use ffn or DepthPruning."
        )
    return free, left


def _why_bound(
    model: PreTrainedModel, group: Group, scope: str, found: dict[tuple[object, ...], str | None]
) -> str | None:
    module = model.get_submodule(scope)
    inside = [member for member in group.members if member.tensor.startswith(f"{scope}.")]
    kind = (type(module), tuple(len(member.channel) for member in inside))
    if kind not in found:
        found[kind] = None
        if any(isinstance(part, nn.Conv1d) for part in module.modules()):
            found[kind] = "a convolution runs over queries, keys and values"
        elif group.count > 1 and next(model.parameters()).device.type != "meta":
            sinks = [member for member in inside if member.consumes]
            if any(_others_change(model, inside, sink) for sink in sinks):
                found[kind] = "what one head computes changes others"
    return found[kind]


def _others_change(model: PreTrainedModel, members: Sequence[Member], sink: Member) -> bool:
    """Tell whether the input places of other heads than 0 differ by more than a factor once head 0 has other signs."""
    before, after = (_inputs_of(model, members, sink, turned) for turned in (False, True))
    if before is None or after is None:
        return False
    others = (sink.channel != 0).nonzero().flatten()
    before, after = (states.flatten(0, -2)[:, others] for states in (before, after))
    factor = (after * before).sum(-1, keepdim=True) / before.square().sum(-1, keepdim=True).clamp(min=1e-30)
    return bool((after - factor * before).abs().max() > 1e-3 * before.abs().max())


def _inputs_of(model: PreTrainedModel, members: Sequence[Member], sink: Member, turned: bool) -> torch.Tensor | None:
    arrived: list[torch.Tensor] = []
    output = model.get_submodule(sink.tensor.rpartition(".")[0])
    with ExitStack() as stack:
        hook = output.register_forward_pre_hook(lambda module, inputs: arrived.append(inputs[0].detach().float().cpu()))
        stack.callback(hook.remove)
        for member in members if turned else ():
            path, _, name = member.tensor.rpartition(".")
            if not member.consumes and name == "weight" and tensor_of(model, member.tensor).dim() == 2:
                hook = model.get_submodule(path).register_forward_hook(_turn((member.channel == 0).nonzero().flatten()))
                stack.callback(hook.remove)
        probe_outputs(model, probe_inputs(model, rows=1, tokens=4))
    return arrived[0] if arrived else None


def _turn(rows: torch.Tensor) -> Any:
    signs = torch.ones(len(rows))
    signs[::3] = -1

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or output.shape[-1] <= int(rows.max()):
            return output
        out = output.clone()
        out[..., rows] = out[..., rows] * signs.to(out)
        return out

    return hook
