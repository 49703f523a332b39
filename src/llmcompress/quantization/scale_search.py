"""The scale search of AWQ (arXiv 2306.00978): channels with large inputs get larger weights, hence smaller errors.

Multiplied by `s > 1` before rounding and divided by it afterwards, a weight is rounded `s` times as finely, as long as
its group does not grow by it. How far to go is found by trying: `s = mean|x|^alpha` for alpha from 0 to 1, and the
same over `mean|w|^(1 - alpha)`; what leaves the least error in the outputs of all readers of the channels is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..anatomy.layers import WeightLayer
from ..anatomy.scaling import ScaleSite
from ..calibration import InputProducts
from .clipping import output_errors
from .fitting import quantize
from .grid import Grid, decode, in_groups

# No channel is scaled further than this: float16 would overflow, and a group would be ruled by one channel.
_FURTHEST = 1e3
# Candidates x weights that are held at a time, and the bytes that each takes while it is rounded and its error found.
_HELD, _HELD_BYTES = 1 << 22, 40


class InputMoments(InputProducts):
    """The sums over all tokens of x x^T and of |x|.

    Args:
        features: how many inputs the layer has.
        device: where the sums are kept.

    Attributes:
        count: tokens seen so far.
        products: the sums of x x^T, shape (features, features), float32.
        magnitudes: the sums of |x|, shape (features,), float32.

    Example:
        >>> seen = InputMoments(2)
        >>> seen.update(torch.tensor([[1.0, -2.0], [0.0, 1.0]]))
        >>> seen.magnitudes.tolist()
        [1.0, 3.0]
    """

    def __init__(self, features: int, device: torch.device | str = "cpu") -> None:
        super().__init__(features, device)
        self.magnitudes = torch.zeros(features, dtype=torch.float32, device=device)

    @classmethod
    def of(cls, layer: WeightLayer) -> InputMoments:
        """Return an empty one for `layer`, on its device."""
        return cls(layer.weight.shape[layer.input_axis], layer.weight.device)

    @classmethod
    def sums(cls, inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return both sums over `inputs` (tokens, features)."""
        return *super().sums(inputs), inputs.float().abs().sum(0)

    def add(self, tokens: int, sums: tuple[torch.Tensor, ...]) -> None:
        """Add both sums of a batch."""
        super().add(tokens, sums)
        self.magnitudes += sums[1]

    def divide(self, factors: torch.Tensor) -> None:
        """Make of the sums those of inputs that are divided by `factors`, shape (features,)."""
        self.products /= factors
        self.products /= factors.unsqueeze(1)
        self.magnitudes /= factors


@dataclass(frozen=True)
class Reader:
    """A layer, or one expert of it, that reads the channels of a site and will be rounded.

    Attributes:
        weight: float32 (outputs, inputs).
        grid: the levels of its weights.
        inputs: sums over its inputs.
    """

    weight: torch.Tensor
    grid: Grid
    inputs: InputMoments


@dataclass(frozen=True)
class ScaleChoice:
    """What a search has found.

    Attributes:
        scales: by which the channels are divided and what reads them is multiplied, shape (channels,), float32,
            between 1/1000 and 1000.
        alpha: the exponent; 0 with no `by_weights` is all ones.
        by_weights: whether the scales were divided by `mean|w|^(1 - alpha)`.
        before: squared error of the readers' outputs without scales, a token.
        after: the same with them; never above `before`.
    """

    scales: torch.Tensor
    alpha: float
    by_weights: bool
    before: float
    after: float


def searching_bytes(weights: int) -> int:
    """Return what the search holds at most for a reader of so many weights.

    Example:
        >>> searching_bytes(1 << 24) // (1 << 20)
        640
    """
    return _HELD_BYTES * _at_once(weights) * weights


def search_scales(site: ScaleSite, readers: Sequence[Reader], n_grid: int) -> ScaleChoice:
    """Search the scales of a site that leave the least error in the outputs of `readers`, rounded to nearest.

    Args:
        site: the channels.
        readers: those of its consumers that will be rounded; at least one has seen tokens.
        n_grid: how many steps of alpha to try, at least 1.

    Returns:
        The best scales: all ones where none are better.
    """
    forms, scales = _candidates(site, readers, n_grid)
    factors = scales[:, site.columns.to(scales.device)]
    # Of experts each sees some of the tokens only.
    tokens = max(reader.inputs.count for reader in readers)
    errors = torch.stack([_errors(reader, factors) for reader in readers if reader.inputs.count]).sum(0) / tokens
    # An overflow in the stored scales is no gain.
    best = int(errors.nan_to_num(torch.inf).argmin())
    if not errors[best] < errors[0]:
        best = 0
    return ScaleChoice(scales[best], *forms[best], before=float(errors[0]), after=float(errors[best]))


def _candidates(
    site: ScaleSite, readers: Sequence[Reader], n_grid: int
) -> tuple[list[tuple[float, bool]], torch.Tensor]:
    """Return exponent and variant of each candidate, and its scales, (candidates, channels); the first is all ones."""
    device = readers[0].weight.device
    columns = site.columns.cpu()

    def by_channel(values: torch.Tensor) -> torch.Tensor:
        # Under grouped-query attention several inputs read one channel.
        sums = torch.zeros(site.channels, dtype=torch.float32)
        # On the CPU: a GPU adds them in another order each time, and the same seed must give the same scales.
        return sums.scatter_reduce(0, columns, values.cpu(), "mean", include_self=False).to(device)

    tokens = sum(reader.inputs.count for reader in readers)
    inputs = by_channel(torch.stack([reader.inputs.magnitudes for reader in readers]).sum(0) / tokens)
    weights = by_channel(torch.cat([_shares(reader) for reader in readers]).mean(0))
    ones = torch.ones_like(inputs)
    usable = (inputs > 0) & (weights > 0)
    if not usable.any():
        return [(0.0, False)], ones.unsqueeze(0)
    forms = [(step / n_grid, by_weights) for by_weights in (False, True) for step in range(n_grid + 1)]
    found = []
    for alpha, by_weights in forms:
        scales = inputs.pow(alpha) / (weights.pow(1 - alpha) if by_weights else 1.0)
        middle = (scales[usable].amin() * scales[usable].amax()).sqrt()
        found.append((scales / middle).clamp(1 / _FURTHEST, _FURTHEST).where(usable, ones))
    return forms, torch.stack(found)


def _shares(reader: Reader) -> torch.Tensor:
    """Return each weight's magnitude as a share of the largest of its group, (rows, columns)."""
    groups = in_groups(reader.weight.abs(), reader.grid)
    shares = groups / groups.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return shares.flatten(1)[:, : reader.weight.shape[1]]


def _at_once(weights: int) -> int:
    """Return how many candidates are tried together on so many weights."""
    return max(_HELD // weights, 1)


def _errors(reader: Reader, factors: torch.Tensor) -> torch.Tensor:
    """Return the squared error of a reader's outputs, over all tokens, for each of `factors` (candidates, columns)."""
    weight, grid = reader.weight, reader.grid
    errors = []
    for some in factors.split(_at_once(weight.numel())):
        scaled = (weight * some.unsqueeze(1)).flatten(0, 1)
        rounded = decode(quantize(scaled, grid), grid).view(len(some), *weight.shape).div_(some.unsqueeze(1))
        repeated = weight.expand_as(rounded).flatten(0, 1)
        lost = output_errors(repeated, rounded.flatten(0, 1), reader.inputs.products)
        errors.append(lost.view(len(some), -1).sum(1))
    return torch.cat(errors)
