"""The weight matrices of a model, each with its kind and its place, and the choice of those a strategy touches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..compressor import Action
from ..errors import CompressionError, NothingToCompressError
from .stacks import find_stacks
from .turns import let_go

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "experts", "embedding", "other"]
Place = Literal["block", "head", "outside"]


@dataclass(frozen=True)
class WeightLayer:
    """One weight matrix (or one stack of expert matrices).

    Attributes:
        path: the module's path, as in `named_modules()`.
        parameter: the weight's name in it; `"weight"` except for 3-D experts.
        kind: `linear` stores (out, in); `conv1d` (in, out); `experts` (experts, ., .); `embedding` (rows, width);
            `other` is a matrix of a module of no such class, such as a router.
        place: inside a repeated `block`, the output `head` of a language model, or `outside` of both.
        tied_to: path of the embedding whose weight this layer shares, or None.
        module: the module itself.
    """

    path: str
    parameter: str
    kind: Kind
    place: Place
    tied_to: str | None
    module: nn.Module

    @property
    def weight(self) -> nn.Parameter:
        """The weight as it is stored."""
        return getattr(self.module, self.parameter)

    @property
    def name(self) -> str:
        """What patterns are matched against: the module's path, and for experts the parameter's."""
        return self.path if self.kind != "experts" else f"{self.path}.{self.parameter}"

    @property
    def input_axis(self) -> int:
        """The axis of `weight` that runs over the inputs of a matrix product."""
        if self.kind == "experts":
            return 1 if _is_transposed(self.module) else 2
        return 0 if self.kind == "conv1d" else 1


def weight_layers(model: PreTrainedModel) -> list[WeightLayer]:
    """Return every float weight matrix of the model in the order of its modules.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> tiny = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
        >>> for layer in weight_layers(tiny):
        ...     print(layer.name, layer.kind, layer.place)
        transformer.wte embedding outside
        transformer.wpe embedding outside
        transformer.h.0.attn.c_attn conv1d block
        transformer.h.0.attn.c_proj conv1d block
        transformer.h.0.mlp.c_fc conv1d block
        transformer.h.0.mlp.c_proj conv1d block
        lm_head linear head
    """
    stacks = [stack.path for stack in find_stacks(model)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    owners: dict[int, str] = {}
    layers = []
    for path, module in model.named_modules():
        place: Place = "head" if module is head else "outside"
        if any(path.startswith(f"{stack}.") for stack in stacks):
            place = "block"
        for parameter, kind in _matrices_of(module):
            weight = getattr(module, parameter)
            tied_to = owners.setdefault(id(weight), path)
            layers.append(WeightLayer(path, parameter, kind, place, tied_to if tied_to != path else None, module))
    return layers


def select(
    model: PreTrainedModel,
    *,
    who: str,
    targets: Sequence[str] | None,
    skip: Sequence[str] = (),
    kinds: Iterable[Kind] = ("linear", "conv1d", "experts"),
    places: Iterable[Place] = ("block",),
) -> tuple[list[WeightLayer], list[Action]]:
    """Choose the layers that a strategy works on, and say of each other one why it is left.

    Args:
        model: the model.
        who: the strategy's name, for messages.
        targets: shell patterns over layer names (`"*.q_proj"`); None takes all of `kinds` in `places`. A pattern may
            name a layer of any place, but only of `kinds`.
        skip: patterns of layers to leave; they win over `targets`.
        kinds: kinds of layers that the strategy can work on.
        places: places that are taken without being named.

    Returns:
        The chosen layers, and an `Action` with a reason for each one left.

    Raises:
        NothingToCompressError: nothing is chosen, or a pattern of `targets` or `skip` matches no layer at all.
    """
    layers = weight_layers(model)
    names = [layer.name for layer in layers]
    for field, patterns in (("targets", targets or ()), ("skip", skip)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise NothingToCompressError(
                    f"no layer of {type(model).__name__} matches {who}.{field}={pattern!r}; it has: {_examples(names)}."
                )
    kinds, places = tuple(kinds), tuple(places)
    chosen, left = [], []
    for layer in layers:
        reason = _reason_to_leave(layer, targets, skip, kinds, places)
        if reason is None:
            chosen.append(layer)
        else:
            left.append(Action(path=layer.name, reason=reason))
    if not chosen:
        raise NothingToCompressError(
            f"{who} finds no layer to work on in {type(model).__name__}; it looked for {', '.join(kinds)} weights"
            f"{f' matching {tuple(targets)}' if targets is not None else ' in the repeated blocks'}, and found: "
            f"{_examples(names) or 'no float weight matrix at all (is the model already quantized?)'}."
        )
    return chosen, left


def by_weight(layers: Iterable[WeightLayer]) -> dict[int, list[WeightLayer]]:
    """Return the layers that share a weight together, by its id.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> found = by_weight(weight_layers(tiny_model("llama")))
        >>> [[layer.name for layer in together] for together in found.values() if len(together) > 1]
        [['model.embed_tokens', 'lm_head']]
    """
    together: dict[int, list[WeightLayer]] = defaultdict(list)
    for layer in layers:
        together[id(layer.weight)].append(layer)
    return together


def refuse_nonfinite(layers: Iterable[WeightLayer]) -> None:
    """Raise `CompressionError` naming the first layer that holds NaN or infinity."""
    for layer in layers:
        # Of any NaN both ends are NaN; and unlike a mask, two numbers take no memory.
        if not torch.isfinite(torch.stack(torch.aminmax(layer.weight.detach()))).all():
            raise CompressionError(f"the weights of {layer.name} hold NaN or infinity; repair the checkpoint first.")
        let_go(layer.weight)


def refusal(layer: WeightLayer, skip: Sequence[str], kinds: Iterable[Kind]) -> str | None:
    """Say why a layer may not be chosen whatever is asked for, or None: the caller skips it, or it is of no such kind.

    Args:
        layer: the layer.
        skip: patterns of layers to leave.
        kinds: kinds of layers that the strategy can work on.
    """
    for pattern in skip:
        if fnmatchcase(layer.name, pattern):
            return f"skip={pattern!r}"
    return None if layer.kind in kinds else f"a weight of kind {layer.kind!r}, which this step does not change"


def _is_transposed(experts: nn.Module) -> bool:
    """Tell whether 3-D expert weights are stored (experts, in, out): as marked by transformers, or by their shapes."""
    marked = getattr(experts, "is_transposed", None)
    if marked is not None:
        return bool(marked)
    own = {name: p.shape for name, p in experts.named_parameters(recurse=False) if p.dim() == 3}
    down = next((shape for name, shape in own.items() if "down" in name), None)
    up = next((shape for name, shape in own.items() if "up" in name), None)
    if down is None or up is None:
        return False
    # What goes into up comes out of down, and what comes out of up (once, or twice with a gate) goes into down.
    plain = up[2] == down[1] and up[1] in (down[2], 2 * down[2])
    return up[1] == down[2] and up[2] in (down[1], 2 * down[1]) and not plain


def _matrices_of(module: nn.Module) -> list[tuple[str, Kind]]:
    if isinstance(module, nn.Linear) and module.weight.is_floating_point():
        return [("weight", "linear")]
    if isinstance(module, Conv1D):
        return [("weight", "conv1d")]
    if isinstance(module, nn.Embedding):
        return [("weight", "embedding")]
    # transformers 5 keeps the experts of a mixture as 3-D parameters of one module; a kernel of a convolution is none.
    kinds: dict[int, Kind] = {2: "other", 3: "other" if isinstance(module, nn.Conv1d) else "experts"}
    own = module.named_parameters(recurse=False)
    return [(name, kinds[tensor.dim()]) for name, tensor in own if tensor.dim() in kinds and tensor.is_floating_point()]


def _reason_to_leave(
    layer: WeightLayer,
    targets: Sequence[str] | None,
    skip: Sequence[str],
    kinds: tuple[Kind, ...],
    places: tuple[Place, ...],
) -> str | None:
    refused = refusal(layer, skip, kinds)
    if refused is not None:
        return refused
    if targets is not None:
        return None if any(fnmatchcase(layer.name, pattern) for pattern in targets) else "not in targets"
    if layer.tied_to is not None:
        return f"tied to {layer.tied_to}"
    if layer.place not in places:
        where = "the output head" if layer.place == "head" else "outside the repeated blocks"
        return f"{where}; name it in targets to include it"
    return None


def _examples(names: list[str], most: int = 8) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more
