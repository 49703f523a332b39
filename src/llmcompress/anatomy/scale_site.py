"""A place where scales can move from what a layer puts out into the weights that read it, and the move itself.

With `y` divided by `s` where it is made, and the input columns of all that read it multiplied by `s`, a model computes
what it did; but activations with outliers become even ones (SmoothQuant, arXiv 2211.10438), and the weights that matter
most become large ones (AWQ, arXiv 2306.00978). Neither costs anything at run time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError
from .layers import WeightLayer, weight_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """Channels that leave one module, and enter some matrix products and nothing else.

    Attributes:
        source: path of the module whose output channels can be divided: a norm, an `nn.Linear` or a `Conv1D`.
        kind: whether the source is a `"norm"` or a `"linear"`.
        consumers: `WeightLayer.name` of each weight that reads the channels; all must be scaled together.
        channels: how many scales there are.
        source_rows: for each channel its position on the source's output axis, shape (channels,): all of them in order,
            or those of the values in a fused q, k, v, or of the up half of a fused gate and up.
        columns: for each input of a consumer the channel it reads, shape (inputs,). Under grouped-query attention
            several inputs of the output projection read one channel of the values.
        offset: what the source, a norm, adds to its weight: 1.0 for those that multiply by `1 + weight`.
    """

    source: str
    kind: Literal["norm", "linear"]
    consumers: tuple[str, ...]
    channels: int
    source_rows: torch.Tensor
    columns: torch.Tensor
    offset: float = 0.0

    def __str__(self) -> str:
        return f"{self.source} -> {', '.join(self.consumers)} ({self.channels} channels)"


@torch.no_grad()
def fold(model: PreTrainedModel, site: ScaleSite, scales: torch.Tensor) -> None:
    """Divide the output channels of the site's source by `scales`, multiply the columns that read them, in place.

    The model computes what it did, but for rounding.

    Args:
        model: the model that the site was found in.
        site: one of `scale_sites(model)`.
        scales: positive and finite, shape (channels,).

    Raises:
        ConfigError: scales of another shape, or one that is not positive and finite.

    Example:
        >>> from llmcompress.anatomy.scaling import scale_sites
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llama")
        >>> before = model(**tiny_inputs(model)).logits
        >>> for site in scale_sites(model):
        ...     fold(model, site, torch.rand(site.channels) + 0.5)
        >>> torch.allclose(model(**tiny_inputs(model)).logits, before, atol=1e-4)
        True
    """
    if tuple(scales.shape) != (site.channels,):
        raise ConfigError(
            f"scales of {site.source} must have the shape ({site.channels},), got {tuple(scales.shape)}; one a channel."
        )
    if not (torch.isfinite(scales).all() and (scales > 0).all()):
        raise ConfigError(f"scales of {site.source} must be positive and finite; clamp them first.")
    source = model.get_submodule(site.source)
    for name, folded in folded_source(source, site, scales).items():
        getattr(source, name).copy_(folded)
    for layer in consumers_of(model, site):
        layer.weight.copy_(folded_consumer(layer, site, scales))


def consumers_of(model: PreTrainedModel, site: ScaleSite) -> list[WeightLayer]:
    """Return the layers that `site.consumers` names."""
    named = {layer.name: layer for layer in weight_layers(model)}
    return [named[name] for name in site.consumers]


def folded_source(source: nn.Module, site: ScaleSite, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the weight and the bias that the source would have, by name."""
    weight = source.weight
    assert isinstance(weight, torch.Tensor)
    # The product is rounded once: scales of the weight's own dtype would add an error of theirs.
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = torch.ones(weight.shape[1 if isinstance(source, Conv1D) else 0], dtype=wide, device=weight.device)
    factor[site.source_rows.to(weight.device)] = scales.to(wide).to(weight.device)
    along = factor.unsqueeze(1) if weight.dim() == 2 and not isinstance(source, Conv1D) else factor
    folded = {"weight": ((weight.to(wide) + site.offset) / along - site.offset).to(weight.dtype)}
    bias = getattr(source, "bias", None)
    if bias is not None:
        folded["bias"] = (bias.to(wide) / factor).to(bias.dtype)
    return folded


def folded_consumer(layer: WeightLayer, site: ScaleSite, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight that a consumer would have."""
    weight = layer.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    shape = [1] * weight.dim()
    shape[layer.input_axis] = -1
    factor = scales.to(wide)[site.columns.to(scales.device)].to(weight.device).view(shape)
    return (weight.to(wide) * factor).to(weight.dtype)
