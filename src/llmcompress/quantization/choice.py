"""Which layers become int8: those asked for that can, and with each of them all that share its weight."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..anatomy.layers import Kind, WeightLayer, by_weight, refusal, select, weight_layers
from ..anatomy.reads import read_directly
from ..anatomy.turns import in_turns
from ..compressor import Action
from ..errors import NothingToCompressError
from .checks import refuse_quantized
from .modules import QuantizedModule, replace_modules

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Each row gets a scale of 4 bytes: below this width (relative position biases, one number a head) it does not pay.
_NARROWEST = 16
# Bytes that each of about a million weights takes while it is coded, and how often a weight is read or written.
_CHUNK, _CHUNK_BYTES, CODING_SWEEPS = 1 << 20, 16, 4
LAST_FLOAT = "transformers tells a model's dtype by a float weight; none else is left"
"""Why a layer is left that `only_float` found."""


def choose(
    model: PreTrainedModel,
    *,
    who: str,
    targets: Sequence[str] | None,
    skip: Sequence[str],
    kinds: Iterable[Kind],
    refused: Mapping[str, str] | None = None,
) -> tuple[list[WeightLayer], list[Action]]:
    """Choose the layers that become int8, wherever they stand in the model, and say of each other one why it is left.

    Args:
        model: the float model.
        who: the strategy's name, for messages.
        targets: patterns of layers to quantize; None takes all.
        skip: patterns of layers to leave in float.
        kinds: kinds of layers that the strategy can quantize.
        refused: by layer name, why a layer that could be int8 stays in float nevertheless.

    Raises:
        UnsupportedModelError: the model is already quantized.
        NothingToCompressError: no layer is left, or a pattern matches none.
    """
    refuse_quantized(model, who)
    kinds = tuple(kinds)
    chosen, left = select(
        model,
        who=who,
        # Named so, tied layers are chosen too; those whose partner must stay in float are taken out below.
        targets=("*",) if targets is None else targets,
        skip=skip,
        kinds=kinds,
        places=("block", "head", "outside"),
    )
    layers = weight_layers(model)
    direct = {**read_directly(model), **(refused or {})}
    return all_or_none(
        model,
        layers,
        who=who,
        asked={layer.name for layer in chosen},
        refused={
            layer.name: reason
            for layer in layers
            if (reason := refusal(layer, skip, kinds) or direct.get(layer.name) or _why_float(layer)) is not None
        },
        left={action.path: action.reason for action in left},
    )


def all_or_none(
    model: PreTrainedModel,
    layers: Sequence[WeightLayer],
    *,
    who: str,
    asked: Container[str],
    refused: Mapping[str, str],
    left: Mapping[str, str | None],
) -> tuple[list[WeightLayer], list[Action]]:
    """Let layers that share a weight go one way: coded if one of them was asked for and none must stay in float.

    Args:
        model: the float model.
        layers: all of its weight layers.
        who: the strategy's name, for messages.
        asked: names of the layers that should be coded.
        refused: by name, why a layer must stay in float, asked for or not.
        left: by name, why a layer was not asked for.

    Returns:
        The layers to code, in the order of `layers`, and an `Action` with a reason for each other one.

    Raises:
        NothingToCompressError: none of those that were asked for can be coded.
    """
    partners = by_weight(layers)
    kept: list[WeightLayer] = []
    floats, others = [], []
    for layer in layers:
        together = [partner.name for partner in partners[id(layer.weight)]]
        if not any(name in asked for name in together):
            others.append(Action(path=layer.name, reason=left.get(layer.name) or "not asked for"))
            continue
        bound = next((name for name in (layer.name, *together) if name in refused), None)
        if bound is None:
            kept.append(layer)
            continue
        shared = f"shares its weight with {bound}, which stays in float: " if bound != layer.name else ""
        floats.append(Action(path=layer.name, reason=f"{shared}{refused[bound]}"))
    last = only_float(model, kept)
    if last is not None:
        kept.remove(last)
        floats.append(Action(path=last.name, reason=LAST_FLOAT))
    if not kept:
        why = "; ".join(f"{action.path}: {action.reason}" for action in floats[:4])
        raise NothingToCompressError(f"{who} can quantize no layer of {type(model).__name__}. {why}")
    return kept, [*floats, *others]


def coding_bytes(weights: Sequence[int]) -> int:
    """Return the bytes that coding layers of so many weights takes at most: the codes of one, and a chunk in floats."""
    return max(weights) + _CHUNK_BYTES * min(max(weights), _CHUNK)


def replace_in_turns(
    model: PreTrainedModel,
    layers: Iterable[WeightLayer],
    quantize: Callable[[WeightLayer], QuantizedModule],
    quantize_experts: Callable[[nn.Module, Sequence[str], bool], QuantizedModule],
) -> None:
    """Replace layers and experts block after block, so that a model bigger than memory can be quantized so.

    Args:
        model: the model.
        layers: of any kind.
        quantize: as for `replace_layers`.
        quantize_experts: as for `replace_experts`.
    """
    layers = list(layers)
    shared: dict[int, QuantizedModule] = {}
    tied = getattr(model, "all_tied_weights_keys", {})
    # Those that only share another one's weight come behind all others.
    last = [layer for layer in layers if f"{layer.path}.{layer.parameter}" in tied]
    for _, own in in_turns(model, [layer for layer in layers if layer not in last]):
        replace_layers(model, [layer for layer in own if layer.kind != "experts"], quantize, shared)
        replace_experts(model, [layer for layer in own if layer.kind == "experts"], quantize_experts)
    replace_layers(model, last, quantize, shared)


def sources_first(model: PreTrainedModel, layers: Iterable[WeightLayer]) -> list[WeightLayer]:
    """Put layers whose weight is tied behind those that they are tied to, as transformers names them.

    Loading ties in that direction, whichever layer comes first in the model: the source holds the scale.
    """
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    return sorted(layers, key=lambda layer: f"{layer.path}.{layer.parameter}" in tied)


def replace_layers(
    model: PreTrainedModel,
    layers: Iterable[WeightLayer],
    quantize: Callable[[WeightLayer], QuantizedModule],
    shared: dict[int, QuantizedModule] | None = None,
) -> None:
    """Put what `quantize` makes of each layer in its place; layers that share a weight share its codes.

    Args:
        model: the model.
        layers: of any kind but experts.
        quantize: makes the module that replaces a layer.
        shared: what has been put in place of a weight by an earlier call, by the weight's id; added to.
    """
    shared = {} if shared is None else shared
    for layer in sources_first(model, layers):
        key = id(layer.weight)
        replacement = quantize(layer)
        replacement.frozen = _frozen(layer.module)
        if key in shared:
            replacement.tie(shared[key])
        shared.setdefault(key, replacement)
        replace_modules(model, {layer.module: replacement})


def replace_experts(
    model: PreTrainedModel,
    weights: Iterable[WeightLayer],
    quantize: Callable[[nn.Module, Sequence[str], bool], QuantizedModule],
) -> None:
    """Put what `quantize` makes of the experts of each block in their place.

    Args:
        model: the model.
        weights: 3-D weights of experts; one module may hold several.
        quantize: gets the module, the names of its weights, and whether those are (experts, inputs, outputs).
    """
    groups: dict[nn.Module, list[WeightLayer]] = defaultdict(list)
    for weight in weights:
        groups[weight.module].append(weight)
    for module, own in groups.items():
        replacement = quantize(module, [weight.parameter for weight in own], own[0].input_axis == 1)
        replacement.frozen = _frozen(module)
        replace_modules(model, {module: replacement})


def _frozen(module: nn.Module) -> frozenset[str]:
    return frozenset(name for name, weight in module.named_parameters(recurse=False) if not weight.requires_grad)


def only_float(model: PreTrainedModel, kept: Sequence[WeightLayer]) -> WeightLayer | None:
    """Return the smallest layer of `kept` if all float parameters of the model are weights in it, or None."""
    coded = {id(layer.weight) for layer in kept}
    if not coded or any(id(tensor) not in coded for tensor in model.parameters() if tensor.is_floating_point()):
        return None
    holders = Counter(id(layer.weight) for layer in kept)
    alone = [layer for layer in kept if holders[id(layer.weight)] == 1]
    return min(alone or kept, key=lambda layer: layer.weight.numel())


def _why_float(layer: WeightLayer) -> str | None:
    """Say why a layer that was asked for cannot be int8, or None."""
    if layer.kind == "experts" and min(layer.weight.shape[1:]) < _NARROWEST:
        rows, columns = layer.weight.shape[1:]
        return f"matrices of {rows} x {columns} are too small for a scale each row"
    module = layer.module
    if isinstance(module, nn.Embedding) and module.embedding_dim < _NARROWEST:
        return own_forward(module) or f"rows of {module.embedding_dim} numbers are too short for a scale each"
    return own_forward(module)


def own_forward(module: nn.Module) -> str | None:
    """Say why the codes of an embedding cannot take its place, or None; all other modules can be replaced."""
    if not isinstance(module, nn.Embedding):
        return None
    if type(module) is not nn.Embedding:
        return f"{type(module).__name__} is an embedding with a forward of its own"
    return "it renormalises its rows at each call (max_norm)" if module.max_norm is not None else None
