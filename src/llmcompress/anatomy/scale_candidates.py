"""Where scales might be moved: norms whose very output enters weights, values before an output projection, up and down.

Candidates only. Who else reads a norm's output, and what stands between two projections, is not looked at here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import UnsupportedModelError
from .find import anatomy
from .layers import WeightLayer, weight_layers
from .parts import Attention, FeedForward, Projection
from .probe import probe_outputs
from .scale_site import ScaleSite, folded_source
from .stacks import find_stacks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READS = ("linear", "conv1d", "other", "experts")


def candidates(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[list[ScaleSite]]:
    """Return possible sites; of each inner list at most one can be right.

    Args:
        model: the model.
        inputs: what its forward takes.
    """
    try:
        body = anatomy(model)
    except UnsupportedModelError:  # blocks with no attention and no network that is known, as of a Mamba
        body = None
    layers = {layer.name: layer for layer in weight_layers(model) if layer.place == "block"}
    downs = {network.down.path for network in body.feed_forwards()} if body is not None else set()
    blocks = tuple(f"{stack.path}." for stack in find_stacks(model))
    found = [[site] for site in _norm_sites(model, inputs, blocks, layers, downs)]
    for block in body.blocks() if body is not None else ():
        for attention in block.attentions:
            found.append(_value_sites(attention))
        for network in block.feed_forwards:
            found.append(_up_sites(network))
    return [sites for sites in found if sites]


def _norm_sites(
    model: PreTrainedModel,
    inputs: Mapping[str, torch.Tensor],
    blocks: tuple[str, ...],
    layers: Mapping[str, WeightLayer],
    downs: set[str],
) -> Iterator[ScaleSite]:
    """Find which weights get the very tensor that a norm inside the blocks put out."""
    norms = {path: module for path, module in model.named_modules() if path.startswith(blocks) and _is_norm(module)}
    readers = defaultdict(list)
    for layer in layers.values():
        if layer.kind in _READS and layer.name not in downs:
            readers[layer.module].append(layer)
    made: dict[int, tuple[str, torch.Tensor]] = {}
    reads: dict[str, dict[str, None]] = defaultdict(dict)

    def note(path: str, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            # Kept until the end of the pass, so that no later tensor gets the same address.
            made[output.data_ptr()] = (path, output)

    def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)), None)
        if given is None or given.data_ptr() not in made:
            return
        path, output = made[given.data_ptr()]
        for layer in readers[module]:
            if given.numel() == output.numel() and layer.weight.shape[layer.input_axis] == output.shape[-1]:
                reads[path][layer.name] = None

    hooks = [
        module.register_forward_hook(lambda module, args, output, path=path: note(path, output))
        for path, module in norms.items()
    ]
    hooks += [module.register_forward_pre_hook(read, with_kwargs=True) for module in readers]
    try:
        probe_outputs(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for path, names in reads.items():
        channels = norms[path].weight.shape[0]
        every = torch.arange(channels)
        site = ScaleSite(path, "norm", tuple(names), channels, every, every)
        offset = _offset(norms[path], site)
        if offset is not None:
            yield ScaleSite(path, "norm", tuple(names), channels, every, every, offset)


def _is_norm(module: nn.Module) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return "weight" in own and set(own) <= {"weight", "bias"} and all(tensor.dim() == 1 for tensor in own.values())


@torch.no_grad()
def _offset(norm: nn.Module, site: ScaleSite) -> float | None:
    """Try what the norm multiplies by: its weight, or one more; None where folding fails for both."""
    weight = norm.weight
    assert isinstance(weight, torch.Tensor)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, site.channels, generator=generator).to(weight)
    scales = torch.rand(site.channels, generator=generator) + 0.5
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 2e-2
    expected = norm(x).float() / scales.to(weight.device)
    for offset in (0.0, 1.0):
        tried = ScaleSite(site.source, "norm", (), site.channels, site.source_rows, site.columns, offset)
        y = torch.func.functional_call(norm, folded_source(norm, tried, scales), x)
        if torch.allclose(y.float(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().amax())):
            return offset
    return None


def _value_sites(attention: Attention) -> list[ScaleSite]:
    heads, kv, width = attention.heads, attention.kv_heads, attention.head_dim
    if heads % kv or attention.o.inputs != heads * width:
        return []
    # The inputs of o that belong to one key head's queries read the same values.
    columns = torch.arange(kv * width).view(kv, 1, width).expand(kv, heads // kv, width).reshape(-1)
    if attention.v is not None:
        rows = torch.arange(kv * width) if attention.v.outputs == kv * width else None
        source = attention.v
    else:
        assert attention.qkv is not None
        rows, source = _value_rows(attention), attention.qkv
    return [_site(source, rows, attention.o, columns)] if rows is not None else []


def _value_rows(attention: Attention) -> torch.Tensor | None:
    """Return which rows of a fused projection make the values."""
    heads, kv, width = attention.heads, attention.kv_heads, attention.head_dim
    every = torch.arange((heads + 2 * kv) * width)
    if attention.qkv is None or attention.qkv.outputs != len(every):
        return None
    if attention.layout == "[q|k|v]":
        return every[(heads + kv) * width :]
    if attention.layout in ("per head [q|k|v]", "per group [q..|k|v]"):
        return every.view(kv, -1, width)[:, -1].reshape(-1)
    return None


def _up_sites(network: FeedForward) -> list[ScaleSite]:
    """Return the site of up and down; which half of a fused projection is up, and which of two, is to be tried."""
    every = torch.arange(network.width)
    if network.gate_up is not None:
        halves = torch.arange(2 * network.width)
        pairs = {"[gate|up]": halves.view(2, -1), "gate, up interleaved": halves.view(-1, 2).t()}
        gate, up = pairs.get(network.layout or "", (None, None))
        rows = [half.clone() for half in (up, gate) if half is not None]
        return [_site(network.gate_up, half, network.down, every) for half in rows]
    sources = [part for part in (network.up, network.gate) if part is not None and part.outputs == network.width]
    return [_site(part, every, network.down, every) for part in sources]


def _site(source: Projection, rows: torch.Tensor, consumer: Projection, columns: torch.Tensor) -> ScaleSite:
    return ScaleSite(source.path, "linear", (consumer.path,), len(rows), rows, columns)
