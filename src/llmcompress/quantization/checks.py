"""What every quantization asks of a model before it changes anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..anatomy.module_sizes import quantized_by
from ..errors import UnsupportedModelError

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
