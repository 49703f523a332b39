"""Which weights the code of a model reads itself, past the layer that holds them: those must stay float tensors.

A layer stored in another form than float answers when it is called. Code that takes `layer.weight` and multiplies by
it, or casts the inputs to `layer.weight.dtype`, would get codes for weights, and an error or nonsense from then on.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from ..errors import UnsupportedModelError
from .kept import modes_kept
from .layers import WeightLayer, weight_layers
from .module_sizes import build
from .probe import probe_inputs, probe_outputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NOTE = "_llmcompress_reads"
_PLAIN = {"linear": nn.Linear, "conv1d": Conv1D, "embedding": nn.Embedding}
# What asks only for a tensor's form, which a layer of codes has as well; the dtype is looked at on its own.
_DTYPE = torch.Tensor.dtype.__get__
_FORM = {
    *(
        getattr(torch.Tensor, name).__get__
        for name in ("shape", "device", "ndim", "requires_grad", "is_cuda", "layout")
    ),
    *(getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "stride", "is_contiguous", "data_ptr")),
}


PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.Tensor.__matmul__,
}
"""Functions f(inputs, weight) with a weight (..., inputs, outputs); that of `F.linear` is the other way round."""
_TURNS = {torch.Tensor.transpose, torch.transpose, torch.Tensor.mT.__get__, torch.Tensor.T.__get__}


def read_directly(model: PreTrainedModel, *, stored: torch.dtype = torch.int8) -> dict[str, str]:
    """Find the layers whose weight is used in another way than by calling the layer, or than one product an expert.

    The model runs once on a few tokens (twice where it asks for the dtype of a weight), with every use of a weight
    watched. A model that holds no weights yet is run as far as that goes; one that reads neither token ids nor pixels
    is judged by the classes of its layers alone. What was found is noted on the model, and on copies of it, for as long
    as its layers stay what they are: a plan and the work after it ask the same.

    Args:
        model: a float model; but for that note it is left as it was.
        stored: the dtype that the weights would have; some models know int8 and leave it alone.

    Returns:
        For each such layer its name, as in `weight_layers`, and the reason, a half-sentence for a plan.

    Example:
        >>> from transformers import MambaConfig, MambaForCausalLM
        >>> sizes = {"vocab_size": 64, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
        >>> read_directly(MambaForCausalLM(MambaConfig(**sizes)))
        {'backbone.layers.0.mixer.dt_proj': 'the code of MambaMixer reads its weight instead of calling it', ...}
    """
    known = weight_layers(model)
    layers = ((layer.name, type(layer.module), layer.weight.shape, layer.weight.is_meta) for layer in known)
    form = (stored, model.dtype, *layers)
    noted: dict[Hashable, dict[str, str]] = vars(model).setdefault(_NOTE, {})
    if form not in noted:
        noted.clear()
        noted[form] = _found(model, known, stored)
    return dict(noted[form])


def _found(model: PreTrainedModel, known: Sequence[WeightLayer], stored: torch.dtype) -> dict[str, str]:
    layers = [layer for layer in known if layer.kind in _PLAIN]
    stacks = [layer for layer in known if layer.kind == "experts"]
    reasons = {layer.name: reason for layer in layers if (reason := _own_forward(layer)) is not None}
    try:
        inputs = probe_inputs(model, rows=1)
    except UnsupportedModelError:
        return reasons
    reads = _Reads(layers, stacks)
    with torch.random.fork_rng(devices=[]), one_expert_at_a_time(stacks), reads.watching():
        _run(model, inputs)
    for layer in stacks:
        if id(layer.weight) in reads.read:
            who = type(layer.module).__name__
            reasons[layer.name] = f"the code of {who} uses it in another way than one product an expert"
    first = set() if model.device.type == "meta" else _read_at_first(model, inputs)
    for layer in layers:
        if id(layer.weight) in reads.read or layer.name in first:
            around = model.get_submodule(layer.path.rpartition(".")[0])
            who = type(around).__name__
            reasons.setdefault(layer.name, f"the code of {who} reads its weight instead of calling it")
    asked = [layer for layer in layers if id(layer.weight) in reads.asked and layer.name not in reasons]
    if asked:
        cast = _cast_inputs(model, asked, inputs, stored)
        reasons.update(dict.fromkeys(cast, "the model casts its inputs to the dtype of its weight"))
    return reasons


def _read_at_first(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the names of the layers whose weight a model of this kind reads at the first call after it was loaded.

    `model` may have had that call (RWKV divides some of its weights then), so its twin without weights is called.
    """
    try:
        twin = build(model)
    except UnsupportedModelError:
        return set()
    layers = [layer for layer in weight_layers(twin) if layer.kind in _PLAIN]
    reads = _Reads(layers)
    with reads.watching():
        _run(twin, inputs)
    return {layer.name for layer in layers if id(layer.weight) in reads.read}


def _run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
    """Run a pass; without weights as far as it goes: to where the code wants to see a value, as routers do."""
    if model.device.type != "meta":
        probe_outputs(model, inputs)
        return
    with modes_kept(model), suppress(Exception), torch.no_grad():  # any model's code runs here
        model.eval()(**{name: tensor.to("meta") for name, tensor in inputs.items()})


def _own_forward(layer: WeightLayer) -> str | None:
    plain: type[nn.Module] = _PLAIN[layer.kind]
    if type(layer.module).forward is plain.forward:
        return None
    what = "an embedding" if layer.kind == "embedding" else "a linear layer"
    return f"{type(layer.module).__name__} is {what} with a forward of its own"


class _Reads(TorchFunctionMode):
    """Notes each weight that a function of torch gets while no layer that holds it is being called.

    Attributes:
        read: ids of weights whose values were used so.
        asked: ids of weights whose dtype was asked for.
    """

    def __init__(self, layers: Iterable[WeightLayer], stacks: Iterable[WeightLayer] = ()) -> None:
        super().__init__()
        # Experts' weights and what is taken of them, kept alive: an id is of one tensor as long as that lives.
        self._parts: dict[int, tuple[torch.Tensor, int]] = {id(s.weight): (s.weight, id(s.weight)) for s in stacks}
        self._holders: dict[int, list[nn.Module]] = defaultdict(list)
        for layer in layers:
            self._holders[id(layer.weight)].append(layer.module)
        self._called: Counter[int] = Counter()
        self.read: set[int] = set()
        self.asked: set[int] = set()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for as long as the context is open."""
        with ExitStack() as stack:
            for weight, holders in self._holders.items():
                for module in holders:
                    # First in and first out, so that other hooks count as code outside of the layer.
                    enter = module.register_forward_pre_hook(lambda *_, weight=weight: self._count(weight, 1))
                    leave = module.register_forward_hook(
                        lambda *_, weight=weight: self._count(weight, -1), always_call=True
                    )
                    stack.callback(enter.remove)
                    stack.callback(leave.remove)
            stack.enter_context(self)
            yield

    def _count(self, weight: int, change: int) -> None:
        self._called[weight] += change

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func not in _FORM:
            for value in (*args, *(kwargs or {}).values()):
                for tensor in value if isinstance(value, (list, tuple)) else (value,):
                    weight = id(tensor)
                    if weight in self._holders and not self._called[weight]:
                        (self.asked if func == _DTYPE else self.read).add(weight)
                    elif weight in self._parts and func != _DTYPE and not _is_product(func, args, tensor):
                        self.read.add(self._parts[weight][1])
        result = func(*args, **(kwargs or {}))
        if args and id(args[0]) in self._parts and (func in _TURNS or func is torch.Tensor.__getitem__):
            self._parts[id(result)] = (result, self._parts[id(args[0])][1])
        return result


def _is_product(func: Any, args: tuple[Any, ...], weight: torch.Tensor) -> bool:
    """Whether `func` multiplies by `weight`, takes one expert of it, or turns it for that."""
    if func is torch.Tensor.__getitem__:
        key = args[1]
        whole = isinstance(key, torch.Tensor) and key.dim() == 0 and not key.is_floating_point()
        return weight.dim() == 3 and (whole or type(key) is int)
    if func in _TURNS:
        return True
    # As the keyword that some write, it is in no place of `args`.
    return (func in PRODUCTS or func is functional.linear) and (not args or args[0] is not weight)


@contextmanager
def one_expert_at_a_time(stacks: Iterable[WeightLayer]) -> Iterator[None]:
    """Let transformers compute experts one by one, with views of their weights: grouped products copy or reorder."""
    configs = {id(config): config for layer in stacks if (config := getattr(layer.module, "config", None)) is not None}
    before = [(c, c._experts_implementation) for c in configs.values() if hasattr(c, "_experts_implementation")]
    try:
        for config, _ in before:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, implementation in before:
            config._experts_implementation = implementation


def _cast_inputs(
    model: PreTrainedModel, layers: Iterable[WeightLayer], inputs: Mapping[str, torch.Tensor], stored: torch.dtype
) -> list[str]:
    """Return the names of the layers that get inputs of the dtype `stored` as soon as their weights seem to have it."""
    seen: dict[str, set[torch.dtype]] = defaultdict(set)
    with ExitStack() as stack:
        for layer in layers:
            parent, _, name = layer.path.rpartition(".")
            holder = model.get_submodule(parent)
            holder._modules[name] = _Disguised(layer.module, stored, seen[layer.name])
            stack.callback(holder._modules.__setitem__, name, layer.module)
        with torch.random.fork_rng(devices=[]):
            _run(model, inputs)
    return [layer.name for layer in layers if layer.kind != "embedding" and stored in seen[layer.name]]


class _Disguised(nn.Module):
    """A layer that computes as `layer` does, and whose weight seems to have another dtype."""

    def __init__(self, layer: nn.Module, dtype: torch.dtype, seen: set[torch.dtype]) -> None:
        super().__init__()
        weight: torch.Tensor = layer.weight
        self._layer, self._seen, self._dtype = (layer,), seen, weight.dtype
        empty = torch.empty((), dtype=dtype, device=weight.device).expand(weight.shape)
        # Registered by hand: `register_parameter` asks whether there is a `weight` yet, and the layer says yes.
        self._parameters["weight"] = nn.Parameter(empty, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Note the dtype of `x`, and go on with that of the weight: T5 in float16 has layers in float32."""
        self._seen.add(x.dtype)
        embeds = isinstance(self._layer[0], nn.Embedding)
        result: torch.Tensor = self._layer[0](x if embeds else x.to(self._dtype))
        return result

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)
