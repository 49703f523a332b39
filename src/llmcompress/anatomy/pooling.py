"""Which token of a text a classifier answers by."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def classifies_last_token(model: PreTrainedModel) -> bool:
    """Tell whether a model classifies a text by its last token, which it finds by `config.pad_token_id` in a batch.

    Example:
        >>> from transformers import LlamaForSequenceClassification
        >>> from llmcompress.testing import tiny_model
        >>> llama = LlamaForSequenceClassification(tiny_model("llama").config)
        >>> classifies_last_token(llama), classifies_last_token(tiny_model("bert"))
        (True, False)
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as ENCODERS

    # Only encoders put their classifier on a token that padding cannot move.
    kind = model.config.get_text_config().model_type
    decodes = kind in DECODERS and kind not in ENCODERS
    return decodes and any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__)
