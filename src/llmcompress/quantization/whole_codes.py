"""Experts in codes are stored as the model has them, whatever transformers does with experts in float.

transformers stores the experts of some models one by one, and joins them when they are loaded. Some versions (5.17 is
one) take our codes and scales for such weights, by the beginning of their names; others do not, and cannot read what
those wrote.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .expert_modules import QuantizedExperts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTRIBUTE = "_weight_conversions"  # of models; what `save_pretrained` reverts


class _WithoutCodes(list[Any]):
    """The conversions that are left."""


def keep_codes_whole(model: PreTrainedModel) -> None:
    """See to it that `save_pretrained` writes experts in codes in the shapes that they have, and all else as ever.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> model = lc.WeightOnlyQuantization().compress(tiny_model("mixtral"), lc.Context())
        >>> keep_codes_whole(model)
        >>> any("experts" in pattern for one in model._weight_conversions for pattern in one.target_patterns)
        False
    """
    known = getattr(model, _ATTRIBUTE, None)
    codes = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, QuantizedExperts)
        for name in (*module._parameters, *module._buffers)
    ]
    if codes:
        found = _of_saving(model) if known is None else known
        setattr(model, _ATTRIBUTE, _WithoutCodes(one for one in found if not _takes(one, codes)))
    elif isinstance(known, _WithoutCodes):
        vars(model).pop(_ATTRIBUTE)  # float experts: transformers looks up what it does with them


def _of_saving(model: PreTrainedModel) -> list[Any]:
    """Return what `save_pretrained` looks up for a model that was not loaded."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    found = get_model_conversion_mapping(model, add_legacy=False)
    return [one for one in found if type(one).__name__ != "PrefixChange"]


def _takes(conversion: Any, names: list[str]) -> bool:
    from transformers.core_model_loading import WeightConverter

    if not isinstance(conversion, WeightConverter):
        return False
    return any(re.search(pattern, name) for pattern in conversion.target_patterns for name in names)
