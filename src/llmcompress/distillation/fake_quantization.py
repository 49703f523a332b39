"""Training for a later quantization: the student computes with rounded weights, and learns through them.

Each weight is rounded on its way into the layer as the quantization step will round it, activations too where that
step codes them. The gradient passes the rounding as if it were not there (straight-through estimator, Bengio et al.
2013, arXiv 1308.3432; Jacob et al. 2018, arXiv 1712.05877), and moves the unrounded weight underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..compressor import Action, Compressor, Rounding, Rounds
from ..errors import ConfigError
from ..registry import compressors

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_rounding_step(given: Any) -> Compressor | None:
    """Return the step that `KnowledgeDistillation.quantize_for` names, from a recipe's dict or name or the step itself.

    Raises:
        ConfigError: it is none that rounds each weight by itself.
    """
    step = compressors.create(given) if isinstance(given, (Mapping, str)) else given
    if step is None or (isinstance(step, Compressor) and isinstance(step, Rounds)):
        return step
    raise ConfigError(
        f"KnowledgeDistillation.quantize_for must be a step that rounds each weight by itself "
        f"(WeightOnlyQuantization, DynamicQuantization, StaticQuantization), got {step!r}; train for "
        f"WeightOnlyQuantization of as many bits, which stores exactly what was trained."
    )


def rounding_action(step: Compressor, roundings: Sequence[Rounding]) -> Action:
    """Return what a plan says of a training for `step`."""
    inputs = sum(rounding.inputs is not None for rounding in roundings)
    return Action(
        path="",
        does=f"train {len(roundings)} weights rounded as {step} will"
        + (f", and the inputs of {inputs} layers" if inputs else ""),
        reason="put that step behind this one",
    )


class _StraightThrough(nn.Module):
    def __init__(self, rounding: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self._rounding = rounding

    def forward(self, exact: torch.Tensor) -> torch.Tensor:
        # Scales of 16 bits are none of what autocast casts, and are to be exact, as they will be when it is rounded.
        with torch.no_grad(), torch.autocast(exact.device.type, enabled=False):
            error = self._rounding(exact.detach()).to(exact.dtype) - exact
        return exact + error


@contextmanager
def fake_quantized(model: PreTrainedModel, roundings: Sequence[Rounding]) -> Iterator[None]:
    """Have `model` compute with rounded weights and activations inside, and with its own weights again afterwards.

    Nothing stays behind: modules, parameters, their order and their identity are as before. If all goes well, the
    weights are `settled` at the end.

    Args:
        model: in training; its weights are float32.
        roundings: from a step's `roundings(model)`.
    """
    modules = [model.get_submodule(rounding.path) for rounding in roundings]
    with ExitStack() as undo:
        for module, rounding in zip(modules, roundings, strict=True):
            undo.enter_context(_rounded_weight(module, rounding))
            if rounding.inputs is not None:
                undo.callback(module.register_forward_pre_hook(_input_hook(rounding.inputs)).remove)
        yield
    for module, rounding in zip(modules, roundings, strict=True):
        weight = getattr(module, rounding.parameter)
        weight.data = settled(weight.data, rounding)


@torch.no_grad()
def settled(weight: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Return `weight` with all outputs rounded that round to themselves, so that the quantization step changes nothing.

    Where an output's rounded weights would be laid on another grid than they came from, its weights stay as they are
    underneath: the step then rounds them to just what was trained. Either way it stores what training ended with.

    Example:
        >>> import torch
        >>> halves = Rounding("fc", "weight", 1, lambda weight: (weight * 2).round() / 2)
        >>> settled(torch.tensor([[0.6, 1.2]]), halves)
        tensor([[0.5000, 1.0000]])
    """
    once = rounding.weight(weight).to(weight.dtype)
    same = (rounding.weight(once).to(weight.dtype) == once).all(dim=rounding.input_axis, keepdim=True)
    mixed = torch.where(same, once, weight)
    return mixed if torch.equal(rounding.weight(mixed).to(weight.dtype), once) else weight


@contextmanager
def _rounded_weight(module: nn.Module, rounding: Rounding) -> Iterator[None]:
    order = list(module._parameters)
    # Unsafe only in that it is not tried out here: the rounding keeps shape and dtype.
    parametrize.register_parametrization(module, rounding.parameter, _StraightThrough(rounding.weight), unsafe=True)
    try:
        yield
    finally:
        parametrize.remove_parametrizations(module, rounding.parameter, leave_parametrized=False)
        module._parameters = {name: module._parameters[name] for name in order}


def _input_hook(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[nn.Module, Any], Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        exact = inputs[0]
        with torch.no_grad():
            error = rounding(exact.detach().float()).to(exact.dtype) - exact
        return (exact + error, *inputs[1:])

    return hook
