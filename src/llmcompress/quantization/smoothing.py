"""SmoothQuant: move what makes activations hard to code in 8 bits into the weights, which are easy (arXiv 2211.10438).

A few input channels of a large model are a hundred times larger than the others, and one scale for all of them leaves
the others no code. Each channel is divided by `max|x|^alpha / max|w|^(1 - alpha)` where it is made, and the weights
that read it are multiplied by the same: the model computes what it did, and all channels are of a size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

import torch

from ..anatomy.layers import WeightLayer
from ..anatomy.scaling import ScaleSite, fold, scale_sites
from ..calibration import observe
from ..compressor import Action

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Of a channel that is almost always zero, which must not be blown up without end.
_SMALLEST, _LARGEST = 1e-4, 1e4


class InputMaxima:
    """The largest magnitude of each input feature over all tokens.

    Args:
        features: how many inputs the layer has.
        device: where they are kept.

    Attributes:
        count: tokens seen so far.
        largest: shape (features,), float32.

    Example:
        >>> seen = InputMaxima(2)
        >>> seen.update(torch.tensor([[3.0, 1.0], [-4.0, 0.0]]))
        >>> seen.largest.tolist()
        [4.0, 1.0]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.largest = torch.zeros(features, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, layer: WeightLayer) -> InputMaxima:
        """Return an empty one for `layer`, on its device."""
        return cls(layer.weight.shape[layer.input_axis], layer.weight.device)

    @torch.no_grad()
    def update(self, inputs: torch.Tensor) -> None:
        """Take in `inputs` (tokens, features)."""
        self.count += len(inputs)
        self.largest = torch.maximum(self.largest, inputs.abs().amax(0).float())


def smooth(
    model: PreTrainedModel,
    batches: Sequence[Mapping[str, torch.Tensor]],
    layers: Sequence[WeightLayer],
    alpha: float,
    *,
    who: str,
    progress: bool = False,
) -> list[Action]:
    """Even out the inputs of `layers` by folding scales into what comes before them, in place.

    Args:
        model: the float model; it computes the same afterwards.
        batches: from `calibration_batches`.
        layers: the layers that will be quantized.
        alpha: how much of the difficulty goes into the weights, in [0, 1].
        who: the strategy's name, for messages.
        progress: whether to show a progress bar.

    Returns:
        For each source that was divided an `Action`, and one with a reason for the layers of the blocks that have none.
    """
    linears = {layer.name: layer for layer in layers if layer.kind in ("linear", "conv1d")}
    sites = [site for site in scale_sites(model) if not linears.keys().isdisjoint(site.consumers)]
    smoothed = {name for site in sites for name in site.consumers}
    asked = [layer for name, layer in linears.items() if name in smoothed]
    told = []
    if asked:
        seen = observe(model, batches, asked, InputMaxima.of, who=who, progress=progress)
        maxima = {name: cast(InputMaxima, statistic) for name, [statistic] in seen.items()}
        for site in sites:
            read = [(linears[name], maxima[name]) for name in site.consumers if name in linears]
            scales = smoothing_scales(site, read, alpha)
            fold(model, site, scales)
            does = f"output divided by {float(scales.min()):.3g} to {float(scales.max()):.3g}, folded into its readers"
            told.append(Action(path=site.source, does=does))
    rough = [name for name, layer in linears.items() if layer.place == "block" and name not in smoothed]
    if rough:
        names = ", ".join(rough[:4]) + (f" and {len(rough) - 4} more" if len(rough) > 4 else "")
        reason = "inputs not smoothed: nothing before them can be divided that only they read, or they are tied"
        told.append(Action(path="", reason=f"{names}: {reason}"))
    return told


def smoothing_scales(site: ScaleSite, read: Sequence[tuple[WeightLayer, InputMaxima]], alpha: float) -> torch.Tensor:
    """Return what each channel of `site` is divided by: `max|x|^alpha / max|w|^(1 - alpha)` over all that read it.

    Args:
        site: the channels.
        read: those of its consumers that will be quantized, with the maxima of their inputs.
        alpha: in [0, 1].

    Returns:
        Scales, shape (channels,), float32; 1 for a channel that is always zero, or that no weight reads.
    """
    device = read[0][0].weight.device
    inputs, weights = torch.zeros(2, site.channels, dtype=torch.float32, device=device)
    columns = site.columns.to(device)
    for layer, seen in read:
        across = layer.weight.detach().float().abs().amax(1 - layer.input_axis)
        weights = weights.scatter_reduce(0, columns, across, "amax")
        inputs = inputs.scatter_reduce(0, columns, seen.largest, "amax")
    scales = inputs.pow(alpha) / weights.pow(1 - alpha)
    usable = (inputs > 0) & (weights > 0)
    return torch.where(usable, scales.clamp(_SMALLEST, _LARGEST), torch.ones_like(scales))
