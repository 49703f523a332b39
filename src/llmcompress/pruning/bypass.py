"""The model with some blocks bypassed: each puts out the hidden states that it got. A cut model must equal it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..calibration.replay import replaced, tensors_of
from ..errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def bypassed(model: PreTrainedModel, paths: Iterable[str]) -> AbstractContextManager[None]:
    """Have the blocks at `paths` hand their hidden states on unchanged, for as long as this is open.

    Each block still runs, so that whatever else it returns (position biases, attention weights) has its form, and the
    blocks around it keep their place: masks and rotary tables that the model chooses by a block's number are right.

    Example:
        >>> from llmcompress.anatomy.probe import probe_outputs
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("gpt2")
        >>> inputs = tiny_inputs(model)
        >>> with bypassed(model, ["transformer.h.0", "transformer.h.1"]):
        ...     outputs = probe_outputs(model, inputs)
        >>> places = torch.arange(8)
        >>> embedded = model.transformer.wte(inputs["input_ids"]) + model.transformer.wpe(places)
        >>> torch.allclose(outputs, model.lm_head(model.transformer.ln_f(embedded)), atol=1e-6)
        True
    """
    return replaced(model, {path: _handing_on(path) for path in paths})


@dataclass(frozen=True)
class Passed:
    """What a block did in one call.

    Attributes:
        before: the hidden states that it got, a copy: a block may change its inputs in place.
        behind: those that it put out.
        outputs: all that it returned.
    """

    before: torch.Tensor
    behind: torch.Tensor
    outputs: Any

    def handed_on(self) -> Any:
        """Return the outputs with the hidden states as they came in."""
        leaves, tree = tree_flatten(self.outputs)
        return tree_unflatten([self.before if leaf is self.behind else leaf for leaf in leaves], tree)


def run_block(path: str, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Passed:
    """Call a block by its `own` forward and find its hidden states.

    They are the first floating-point tensor that is put out, and the first one of its shape that comes in.

    Raises:
        UnsupportedModelError: the block at `path` changes the shape of its hidden states.
    """
    copies = [tensor.clone() for tensor in tensors_of((args, kwargs)) if tensor.is_floating_point()]
    outputs = own(*args, **kwargs)
    behind = next((tensor for tensor in tensors_of(outputs) if tensor.is_floating_point()), None)
    for before in copies:
        if behind is not None and before.shape == behind.shape:
            return Passed(before, behind, outputs)
    raise UnsupportedModelError(
        f"{path} does not put out hidden states of the shape that it got, so it cannot be left out; only stacks whose "
        f"blocks have equal inputs and outputs lose some."
    )


def _handing_on(path: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def make(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return run_block(path, own, args, kwargs).handed_on()

        return forward

    return make
