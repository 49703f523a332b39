"""Find where scales can be moved from one layer into the next: by trying it, not by names of architectures.

Each candidate is tried with powers of two, which change no digit of a float: what a source puts out is divided, what
its consumers take in is multiplied, and the logits must stay what they were. They do not where anything else reads the
channels (the residual of a post-norm model), or where what stands between does not scale (a GELU; a ReLU does).
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .layers import WeightLayer, weight_layers
from .probe import probe_inputs, probe_outputs, relative_error
from .scale_candidates import candidates
from .scale_site import ScaleSite, fold, folded_consumer, folded_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ScaleSite", "fold", "scale_sites"]


def scale_sites(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor] | None = None) -> list[ScaleSite]:
    """Return where the output channels of a module of the blocks can be divided, and the weights that read it scaled.

    Found are norms before projections (and before a router with its 3-D experts), values before the output projection
    of an attention, and the widening projection of a feed-forward network before the narrowing one, if it is gated or
    has a ReLU. Folding them leaves the logits what they are; hidden states on the way become others. Not found are
    norms whose output is the residual too (BERT), norms outside of the blocks, whose output is one of the model's, what
    is inside 3-D experts, and weights that are tied.

    Args:
        model: the model, with weights; not changed. A handful of short forward passes are run.
        inputs: what to run it on; None takes random tokens.

    Returns:
        The sites, in the order of their sources in the model. Every weight is consumer in one of them at most.

    Raises:
        UnsupportedModelError: the model reads neither token ids nor pixels, and no `inputs` are given.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> for site in scale_sites(tiny_model("gpt2"))[:3]:
        ...     print(site)
        transformer.h.0.ln_1 -> transformer.h.0.attn.c_attn (64 channels)
        transformer.h.0.attn.c_attn -> transformer.h.0.attn.c_proj (64 channels)
        transformer.h.0.ln_2 -> transformer.h.0.mlp.c_fc (64 channels)
    """
    given = dict(inputs if inputs is not None else probe_inputs(model))
    trial = _Trial(model, given)
    groups: dict[tuple[str, ...], list[list[ScaleSite]]] = defaultdict(list)
    for alternatives in candidates(model, given):
        usable = [site for site in alternatives if not trial.has_tied_weight(site)]
        if usable:
            # Blocks are mostly alike: one pass tries the same place in all of them.
            first = usable[0]
            groups[tuple(re.sub(r"\d+", "*", name) for name in (first.source, *first.consumers))].append(usable)
    found = [site for group in groups.values() for site in _right_ones(trial, group)]
    order = {path: number for number, (path, _) in enumerate(model.named_modules())}
    found.sort(key=lambda site: order[site.source])
    return _each_consumer_once(found)


def _right_ones(trial: _Trial, group: Sequence[Sequence[ScaleSite]]) -> list[ScaleSite]:
    """Return those that hold of the same place in several blocks, each given as a list of alternatives."""
    for number in range(max(map(len, group))):
        sites = [alternatives[number] for alternatives in group if len(alternatives) > number]
        if trial.holds(sites):
            return sites
    # Not all alike. Where neither the first nor the last one holds, it is a place that no block offers.
    ends = [site for alternatives in (group[0], group[-1]) for site in alternatives if trial.holds([site])]
    if not ends:
        return []
    each = (next((site for site in alternatives if trial.holds([site])), None) for alternatives in group)
    return [site for site in each if site is not None]


def _each_consumer_once(sites: Sequence[ScaleSite]) -> list[ScaleSite]:
    taken: set[str] = set()
    kept = []
    for site in sites:
        if taken.isdisjoint(site.consumers):
            kept.append(site)
            taken.update(site.consumers)
    return kept


class _Trial:
    """Tries sites on a model without changing it."""

    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        self._model, self._inputs = model, inputs
        self._layers: dict[str, WeightLayer] = {layer.name: layer for layer in weight_layers(model)}
        self._expected = probe_outputs(model, inputs)
        self._tolerance = 1e-6 if model.dtype in (torch.float32, torch.float64) else 1e-3
        places = {(id(module), name): id(p) for module in model.modules() for name, p in module._parameters.items()}
        self._owners = Counter(places.values())

    def has_tied_weight(self, site: ScaleSite) -> bool:
        """Tell whether a tensor that would change is a parameter of another module, too."""
        own = self._model.get_submodule(site.source)._parameters.values()
        tensors = [*own, *(self._layers[name].weight for name in site.consumers)]
        return any(tensor is not None and self._owners[id(tensor)] > 1 for tensor in tensors)

    def holds(self, sites: Sequence[ScaleSite]) -> bool:
        """Tell whether the model computes the same with all of `sites` scaled."""
        scales = [_powers_of_two(site) for site in sites]
        with _scaled(self._model, sites, scales, self._layers) as silent:
            same = self._is_same(probe_outputs(self._model, self._inputs))
            # A module whose weight is read by the code of another one never runs, and proves nothing.
            if not same or silent():
                return False
        inside = [(s, by) for s, by in zip(sites, scales, strict=True) if not self._called(s)]
        # The inputs of a module with experts are scaled as a whole above: that its weights can do it is shown here.
        return all(self._is_same(self._with_weights(site, by)) for site, by in inside)

    def _called(self, site: ScaleSite) -> bool:
        return all(self._layers[name].kind in ("linear", "conv1d") for name in site.consumers)

    @torch.no_grad()
    def _with_weights(self, site: ScaleSite, scales: torch.Tensor) -> torch.Tensor:
        source = self._model.get_submodule(site.source)
        changed = {f"{site.source}.{name}": new for name, new in folded_source(source, site, scales).items()}
        for layer in map(self._layers.__getitem__, site.consumers):
            changed[f"{layer.path}.{layer.parameter}"] = folded_consumer(layer, site, scales)
        before = {name: self._model.get_parameter(name) for name in changed}
        try:
            self._put({name: nn.Parameter(new, requires_grad=False) for name, new in changed.items()})
            return probe_outputs(self._model, self._inputs)
        finally:
            self._put(before)

    def _put(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, attribute = name.rpartition(".")
            self._model.get_submodule(path)._parameters[attribute] = parameter

    def _is_same(self, found: torch.Tensor) -> bool:
        return relative_error(found, self._expected) < self._tolerance


def _powers_of_two(site: ScaleSite) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2.0 ** torch.randint(-2, 3, (site.channels,), generator=generator)


@contextmanager
def _scaled(
    model: PreTrainedModel,
    sites: Sequence[ScaleSite],
    scales: Sequence[torch.Tensor],
    layers: Mapping[str, WeightLayer],
) -> Iterator[Callable[[], bool]]:
    """Divide what sources put out and multiply what consumers take in; yields whether any of them did not run."""
    waiting: set[tuple[str, nn.Module]] = set()
    hooks = []
    try:
        for site, by in zip(sites, scales, strict=True):
            source = model.get_submodule(site.source)
            waiting.add(("source", source))
            hooks.append(source.register_forward_hook(_divide(site, by, waiting)))
            for module in dict.fromkeys(layers[name].module for name in site.consumers):
                waiting.add(("consumer", module))
                hooks.append(module.register_forward_pre_hook(_multiply(site, by, waiting), with_kwargs=True))
        yield lambda: bool(waiting)
    finally:
        for hook in hooks:
            hook.remove()


def _divide(site: ScaleSite, scales: torch.Tensor, waiting: set[tuple[str, nn.Module]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        waiting.discard(("source", module))
        factor = output.new_ones(output.shape[-1])
        factor[site.source_rows.to(output.device)] = scales.to(output)
        return output / factor

    return hook


def _multiply(site: ScaleSite, scales: torch.Tensor, waiting: set[tuple[str, nn.Module]]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Any]:
        waiting.discard(("consumer", module))
        factor = scales[site.columns]
        if args:
            return (args[0] * factor.to(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: kwargs[name] * factor.to(kwargs[name])}

    return hook
