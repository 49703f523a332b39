"""How a student is trained, in the terms of this library and in those of `transformers.Trainer`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from ..errors import NothingToCompressError, UnsupportedModelError
from .early_stopping import EarlyStopping
from .lora import LoRA, require_peft

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

Precision = Literal["auto", "fp32", "bf16"]

_TENTH = 0.1
# Gradients of a larger norm are scaled down to it: Trainer's default, named here since it changes what is learned.
_GRADIENT_NORM = 1.0


@dataclass(frozen=True)
class Training:
    """How a student is trained: fields of `KnowledgeDistillation` of these names, and where.

    Attributes:
        pad: token that pads inputs.
        decoder_start: first token of an encoder-decoder's decoder.
        seed: seeds order, dropout and whatever is drawn.
        progress: whether a bar is shown.
        folder: where checkpoints are kept, from the last of which training goes on; None keeps none.
        tokenizer: of the student, for the task that decides on early stopping.
    """

    epochs: float | None
    steps: int | None
    learning_rate: float
    batch_size: int
    warmup: float
    weight_decay: float
    gradient_accumulation: int
    precision: Precision
    dropout: float | None = None
    gradient_checkpointing: bool = False
    lora: LoRA | None = None
    early_stopping: EarlyStopping | None = None
    pad: int = 0
    decoder_start: int | None = None
    seed: int = 0
    progress: bool = False
    folder: Path | None = None
    tokenizer: PreTrainedTokenizerBase | None = None


def check_training(
    model: PreTrainedModel, *, gradient_checkpointing: bool, lora: LoRA | None, early_stopping: EarlyStopping | None
) -> None:
    """Refuse a training that `model` or what is installed does not allow.

    Raises:
        UnsupportedModelError: its activations cannot be computed again, its head does not fit the task that decides, or
            its decoder has no first token.
        MissingInputError: LoRA is wanted and peft is not installed.
        NothingToCompressError: no layer has a name that LoRA targets.
    """
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        raise UnsupportedModelError(
            f"KnowledgeDistillation needs the first token of the decoder of {type(model).__name__}, and its config has "
            f"no decoder_start_token_id; set model.config.decoder_start_token_id, for T5 to its pad_token_id."
        )
    if gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise UnsupportedModelError(
            f"KnowledgeDistillation.gradient_checkpointing must be False for {type(model).__name__}, which cannot "
            f"compute activations again; use a smaller batch_size with gradient_accumulation."
        )
    if lora is not None:
        require_peft()
        _check_targets(model, lora.targets)
    if early_stopping is not None and early_stopping.task is not None:
        early_stopping.task.check(model)


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Refuse targets before the teacher is asked that peft would refuse behind it."""
    names = [f".{name}" for name, _ in model.named_modules()]
    if targets and not any(name.endswith(f".{target}") for name in names for target in targets):
        raise NothingToCompressError(
            f"KnowledgeDistillation.lora finds no layer of {type(model).__name__} whose name ends as one of "
            f"{targets!r}; leave LoRA.targets out for all linear layers."
        )


def training_arguments(training: Training, folder: Path, device: torch.device) -> TrainingArguments:
    """Return Trainer's own settings for a model on `device` whose output goes to `folder`."""
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=training.epochs if training.epochs is not None else 1,
        max_steps=training.steps if training.steps is not None else -1,
        per_device_train_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=_GRADIENT_NORM,
        bf16=use_bf16(training.precision, device),
        use_cpu=device.type == "cpu",
        seed=training.seed,
        # Shares of all steps; both at the same ones, so that no mean loss is cut in two by a restart.
        save_strategy="no" if training.folder is None else "steps",
        save_steps=_TENTH,
        save_total_limit=1,
        logging_strategy="steps",
        logging_steps=_TENTH,
        logging_first_step=True,
        report_to="none",
        disable_tqdm=not training.progress,
        remove_unused_columns=False,
        dataloader_pin_memory=device.type == "cuda",
    )
    # One process drives one device: DataParallel would copy the student, not the teacher.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def use_bf16(precision: Precision, device: torch.device) -> bool:
    """Tell whether matrix products are in bfloat16; `"auto"` takes it where the hardware gains by it."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # AVX-512's bf16 dot product alone loses more in casts than it gains (measured: 1.1x to 1.4x slower than fp32 on
        # MiniLM); matrix tiles pay.
        return bool(getattr(torch.cpu, "_is_amx_tile_supported", bool)())
    return False
