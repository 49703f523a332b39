"""What every quantization asks of a model before it changes anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..anatomy.layers import WeightLayer
from ..anatomy.module_sizes import quantized_by
from ..anatomy.turns import let_go
from ..errors import CompressionError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_quantized(model: PreTrainedModel, who: str) -> None:
    """Raise `UnsupportedModelError` if `model` is quantized already, by whatever method."""
    method = quantized_by(model)
    if method is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is already quantized ({method}); {who} needs the float model: load that instead."
        )


def refuse_sizes(model: PreTrainedModel, who: str) -> None:
    """Raise `UnsupportedModelError` if the config of `model` notes sizes, which another method's config cannot hold."""
    sizes = getattr(getattr(model.config, "quantization_config", None), "sizes", None)
    if sizes:
        raise UnsupportedModelError(
            f"{who} cannot quantize {type(model).__name__}, whose {next(iter(sizes))} has a size that a plain config "
            f"does not tell; use DynamicQuantization, or prune with uniform=True."
        )


def refuse_nonfinite(layers: Iterable[WeightLayer]) -> None:
    """Raise `CompressionError` naming the first layer that holds NaN or infinity."""
    for layer in layers:
        if not torch.isfinite(layer.weight).all():
            raise CompressionError(f"the weights of {layer.name} hold NaN or infinity; repair the checkpoint first.")
        let_go(layer.weight)
