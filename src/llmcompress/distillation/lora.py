"""Low-rank adapters in place of the weights: trained, then added to them (arXiv 2106.09685), by way of peft."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic import Field

from ..compressor import Settings
from ..errors import MissingInputError, NothingToCompressError
from .heads import LANGUAGE_MODELS, Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoRA(Settings):
    """Train a low-rank change of the linear layers instead of their weights: a small part of the optimizer's memory.

    Afterwards the changes are added to the weights, so that the model is as plain as before. What is no linear layer of
    a block stays as it is, but for the head of a classifier. Zeros of earlier pruning are written again after that.
    Needs `pip install llmcompress[lora]`.

    Args:
        rank: of the change of each layer.
        scale: the change is multiplied by it over the rank ("lora alpha").
        dropout: on what enters the change, in [0, 1).
        targets: ends of the names of the layers that are changed, such as `("q_proj", "v_proj")`; all linear layers but
            the head if empty.

    Example:
        >>> LoRA(rank=0)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: LoRA.rank must be in (0, inf), got 0.
    """

    rank: int = Field(8, gt=0, description="rank of the change of each layer")
    scale: float = Field(16.0, gt=0, description="the change is multiplied by scale / rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="on what enters the change")
    targets: tuple[str, ...] = Field((), description="ends of the names of the layers; all linear ones if empty")


def require_peft() -> Any:
    """Return peft.

    Raises:
        MissingInputError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise MissingInputError(
            "KnowledgeDistillation.lora needs the package peft, which is not installed; "
            "pip install llmcompress[lora], or leave lora out to train all weights."
        ) from error
    return peft


@contextmanager
def adapted(model: PreTrainedModel, settings: LoRA, head: Head) -> Iterator[int]:
    """Have `model` train low-rank changes inside, add them to its weights afterwards, and be as plain as before.

    If training fails, the changes are thrown away.

    Args:
        model: in training.
        settings: of the changes.
        head: the head of a language model stays as it is, any other is trained whole.

    Yields:
        How many layers are changed.

    Raises:
        MissingInputError: peft is not installed.
        NothingToCompressError: no layer matches `targets`.
    """
    peft = require_peft()
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale,
        lora_dropout=settings.dropout,
        target_modules=list(settings.targets) or "all-linear",
    )
    body = f"{model.base_model_prefix}."
    heads = set() if head in LANGUAGE_MODELS else {name for name in trainable if not name.startswith(body)}
    try:
        peft.inject_adapter_in_model(config, model)
    except ValueError as error:
        raise NothingToCompressError(
            f"KnowledgeDistillation.lora finds no layer of {type(model).__name__} whose name ends as one of "
            f"{settings.targets!r}: {error}"
        ) from error
    for name, parameter in model.named_parameters():
        if name in heads:
            parameter.requires_grad_(trainable[name])
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "lora_A")]
    done = False
    try:
        yield len(layers)
        done = True
    finally:
        for name, layer in layers:
            if done:
                layer.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, layer.get_base_layer())
        if hasattr(model, "peft_config"):
            del model.peft_config
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trainable[name])
