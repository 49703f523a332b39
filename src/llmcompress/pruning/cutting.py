"""Cut groups of channels out of a model, write the config, and prove that the slice does what the mask did."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.empty import weightless
from ..anatomy.groups import Group, Kind, cut, new_shapes
from ..anatomy.masking import masked
from ..anatomy.probe import probe_inputs, probe_outputs, refuse_nonfinite_outputs, relative_error
from ..anatomy.residual import rescale_norms
from ..anatomy.sizes import Shapes, adopt_config, matches_config, shapes_of
from ..anatomy.stream_scale import Stream, run_stream, take_back_scales
from ..anatomy.surgery import retie, ties
from ..compressor import Action, Context, Cut
from ..errors import UnsupportedModelError, VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sliced and masked networks add the same numbers in another order; more than this is a wrong slice.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def cut_proven(
    model: PreTrainedModel,
    cuts: Sequence[tuple[Group, torch.Tensor]],
    context: Context,
    *,
    values: Mapping[str, Any] | None,
    who: str,
) -> None:
    """Keep only the given channels of each group, in place; what stayed goes into `context.history`.

    Args:
        model: the model.
        cuts: each group that loses channels, with those it keeps: shape (kept,), or (experts, kept).
        context: its seed makes the proof's inputs; it is told what LayerNorms lose when hidden features go.
        values: config attributes that tell the new sizes, or None where no config shall tell them.
        who: the strategy, for messages.

    Raises:
        VerificationError: the sliced model is not what the masked one was.
        UnsupportedModelError: it does not run; or, without hidden features or experts, is not what the masked one was.
    """
    tied = ties(model)
    predicted = {**shapes_of(model), **new_shapes(model, [(group, keep.shape[-1]) for group, keep in cuts])}
    inputs = probe_inputs(model, seed=context.seed)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, 0] = 0  # some models make their masks by numbers that they remember
    hidden = next(((group, keep) for group, keep in cuts if group.kind == "hidden"), None)
    with masked(model, cuts):
        expected = _answer(model, hidden, inputs)
    refuse_nonfinite_outputs(model, expected.outputs)
    if hidden is not None:
        _tell_of_means(expected.outputs, probe_outputs(model, inputs), context)
    for group, keep in cuts:
        cut(model, group, keep)
        if group.kind not in ("hidden", "experts") and keep.dim() == 1:
            rescale_norms(model, group, len(keep))  # norms over heads or channels
        context.history.extend(_history(group, keep))
    retie(model, tied)
    if hidden is not None:
        rescale_norms(model, hidden[0], len(hidden[1]))
    if values is not None:
        adopt_config(model, values)
    _prove_shapes(model, predicted, told_by_config=values is not None, who=who)
    with _running(model):
        if hidden is not None:
            found = take_back_scales(model, *hidden, expected, inputs)
        else:
            found = _answer(model, None, inputs)
    _prove_outputs(model, found.outputs, expected.outputs, {group.kind for group, _ in cuts}, who=who)


def cut_outlined(
    model: PreTrainedModel,
    cuts: Sequence[tuple[Group, torch.Tensor]],
    context: Context,
    *,
    values: Mapping[str, Any] | None,
) -> None:
    """Do to the sizes of a model without weights what `cut_proven` does; arguments as there."""
    tied = ties(model)
    for group, keep in cuts:
        cut(model, group, keep)
        context.history.extend(_history(group, keep))
    retie(model, tied)
    if values is not None:
        adopt_config(model, values)


def refuse_if_bound(model: PreTrainedModel, cuts: Sequence[tuple[Group, torch.Tensor]]) -> None:
    """Refuse a model whose code does not run with the sizes that `cuts` leave, before any work. Reads no weight.

    Shapes alone are tried. Where a model does not run without weights even uncut, nothing can be said.

    Raises:
        UnsupportedModelError: naming what went wrong.
    """
    small = weightless(model)
    inputs = {name: tensor.to("meta") for name, tensor in probe_inputs(model).items()}
    try:
        probe_outputs(small, inputs)
    except Exception:  # any model's code runs here, and may look at values
        return
    cut_outlined(small, cuts, Context(), values=None)
    with _running(small):
        probe_outputs(small, inputs)


def _answer(
    model: PreTrainedModel, hidden: tuple[Group, torch.Tensor] | None, inputs: Mapping[str, torch.Tensor]
) -> Stream:
    if hidden is None:
        return Stream(outputs=probe_outputs(model, inputs))
    return run_stream(model, hidden[0], inputs)


def _tell_of_means(sliced: torch.Tensor, silenced: torch.Tensor, context: Context) -> None:
    """Say what it changes that LayerNorms take their mean over fewer features, and RMSNorms add their epsilon to it."""
    difference = relative_error(sliced, silenced)
    if difference > _TOLERANCE[torch.float32]:
        remark = f"norms now take their mean over fewer features, which alone moves outputs by {difference:.2g}"
        context.tell(Action(path="", reason=f"{remark} (relative, on random tokens)"))


@contextmanager
def _running(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # any model's code runs here
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with fewer of these parts ({type(error).__name__}: {error}); another "
            f"part of it depends on their number. Use another axis, or DepthPruning."
        ) from error


def _prove_shapes(model: PreTrainedModel, predicted: Shapes, *, told_by_config: bool, who: str) -> None:
    name = type(model).__name__
    if shapes_of(model) != predicted:
        raise VerificationError(
            f"{who}: the pruned {name} has other shapes than predicted; the result is withheld. Please report this "
            f"model."
        )
    if told_by_config and not matches_config(model):
        raise VerificationError(
            f"{who}: the pruned {name} has other shapes than its config tells; the result is withheld. Please report "
            f"this model."
        )


def _prove_outputs(
    model: PreTrainedModel, found: torch.Tensor, expected: torch.Tensor, kinds: set[Kind], *, who: str
) -> None:
    name = type(model).__name__
    difference = relative_error(found, expected) if found.shape == expected.shape else float("inf")
    if difference <= _TOLERANCE.get(model.dtype, 1e-4):
        return
    for kind, parts in (("hidden", "features"), ("experts", "experts")):
        if kind in kinds:
            raise UnsupportedModelError(
                f"{kind} of {name} cannot be pruned: without the {parts} it differs from the model in which they do "
                f"nothing by {difference:.1e} (relative), so something in it depends on their number; use ffn, heads "
                f"or DepthPruning."
            )
    raise VerificationError(
        f"{who}: the sliced {name} differs from the masked one by {difference:.1e} (relative); the result is withheld. "
        f"Please report this model."
    )


def _history(group: Group, keep: torch.Tensor) -> list[Cut]:
    if keep.dim() == 1:
        return [Cut(group.path, group.kind, tuple(keep.tolist()), group.count)]
    return [Cut(f"{group.path}.{i}", group.kind, tuple(row.tolist()), group.count) for i, row in enumerate(keep)]
