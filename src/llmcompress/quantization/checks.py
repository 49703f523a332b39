"""What every quantization asks of a model before it changes anything."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..anatomy.layers import WeightLayer
from ..errors import CompressionError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_quantized(model: PreTrainedModel, who: str) -> None:
    """Raise `UnsupportedModelError` if `model` is quantized already, by whatever method."""
    method = getattr(model, "quantization_method", None)
    if method is not None or getattr(model.config, "quantization_config", None) is not None:
        name = getattr(method, "value", method) or "config.quantization_config is set"
        raise UnsupportedModelError(
            f"{type(model).__name__} is already quantized ({name}); {who} needs the float model: load that instead."
        )


def refuse_nonfinite(layers: Iterable[WeightLayer]) -> None:
    """Raise `CompressionError` naming the first layer that holds NaN or infinity."""
    for layer in layers:
        if not torch.isfinite(layer.weight).all():
            raise CompressionError(f"the weights of {layer.name} hold NaN or infinity; repair the checkpoint first.")
