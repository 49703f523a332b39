"""Constants that a model derives from its hidden size, measured and taken back after the hidden size was cut.

Gemma multiplies its embeddings by the root of the hidden size, T5 its last states by the inverse. No name tells which
model does what, so the cut model is compared with the masked one at two places: what comes out of the embedding or into
the first block, and the logits. Where one is a constant times the other, the embedding or the last norm takes it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .groups import Group
from .probe import probe_outputs
from .residual import norms_of, rescale
from .stacks import find_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Other differences than a constant factor, and factors so near to 1, are not for here.
_CONSTANT, _ONE = 1e-3, 1e-5


@dataclass
class Stream:
    """What a model computed at the places that are compared.

    Attributes:
        embedded: what came out of the token embeddings, one tensor a call.
        entered: what the first block of each stack got.
        outputs: the logits, or the last hidden states.
        last_norm: path of the last norm over the residual stream that ran, or None.
    """

    embedded: list[torch.Tensor] = field(default_factory=list)
    entered: list[torch.Tensor] = field(default_factory=list)
    outputs: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    last_norm: str | None = None


def run_stream(model: PreTrainedModel, group: Group, inputs: Mapping[str, torch.Tensor]) -> Stream:
    """Run `inputs` and keep what is compared; `group` is the residual stream."""
    stream = Stream()
    table = model.get_input_embeddings().weight

    def keep_first(into: list[torch.Tensor]) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
            into.extend(tensor.float().clone() for tensor in tensors[:1])

        return hook

    def ran(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            stream.last_norm = path

        return hook

    handles = [norm.register_forward_hook(ran(path)) for path, norm in norms_of(model, group).items()]
    for module in model.modules():
        if getattr(module, "weight", None) is table and isinstance(module, nn.Embedding):
            handles.append(
                module.register_forward_hook(lambda _, __, output: stream.embedded.append(output.float().clone()))
            )
    for stack in find_stacks(model):
        handles.append(stack.blocks[0].register_forward_pre_hook(keep_first(stream.entered), with_kwargs=True))
    try:
        stream.outputs = probe_outputs(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return stream


def take_back_scales(
    model: PreTrainedModel, group: Group, keep: torch.Tensor, masked: Stream, inputs: Mapping[str, torch.Tensor]
) -> Stream:
    """Change the token embedding and the last norm of the cut `model` so that constant factors to the mask are gone.

    Args:
        model: cut, with the config that tells its new sizes.
        group: the residual stream as it was.
        keep: the features that stayed.
        masked: what the masked model computed on `inputs`.
        inputs: what both run on.

    Returns:
        What the model computes now.
    """
    stream = run_stream(model, group, inputs)
    factor = _factor(stream.embedded, masked.embedded, keep) or _factor(stream.entered, masked.entered, keep)
    if factor is not None:
        table: torch.Tensor = model.get_input_embeddings().weight
        with torch.no_grad():
            table.div_(factor)
        head = model.get_output_embeddings()
        if head is not None and head.weight is table and stream.last_norm is not None:
            rescale(model.get_submodule(stream.last_norm), factor)
        stream = run_stream(model, group, inputs)
    if stream.outputs.shape == masked.outputs.shape and stream.last_norm is not None:
        factor = _constant(stream.outputs, masked.outputs)
        if factor is not None:
            rescale(model.get_submodule(stream.last_norm), 1 / factor)
            stream = run_stream(model, group, inputs)
    return stream


def _factor(ours: list[torch.Tensor], theirs: list[torch.Tensor], keep: torch.Tensor) -> float | None:
    """Return the one factor by which every one of `ours` differs from the kept features of `theirs`, or None."""
    pairs = list(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else []
    factors = [_constant(one, other.index_select(-1, keep.to(other.device))) for one, other in pairs]
    first = factors[0] if factors else None
    same = first is not None and all(one is not None and abs(one / first - 1) < _CONSTANT for one in factors)
    return first if same else None


def _constant(ours: torch.Tensor, theirs: torch.Tensor) -> float | None:
    """Return the factor other than 1 that makes `theirs` into `ours`, or None where there is none."""
    size = float(theirs.square().sum())
    if ours.shape != theirs.shape or size == 0:
        return None
    factor = float((ours * theirs).sum()) / size
    rest = float((ours - factor * theirs).norm()) / max(float(ours.norm()), 1e-12)
    return factor if rest < _CONSTANT and factor > 0 and abs(factor - 1) > _ONE else None
