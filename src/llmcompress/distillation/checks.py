"""What is refused before any work: students that cannot be trained, and teachers that do not match them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..anatomy.module_sizes import quantized_by
from ..anatomy.vocabulary import vocabulary_size
from ..compressor import Context, still_there
from ..errors import UnsupportedModelError
from .heads import LANGUAGE_MODELS, Head, head_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_untrainable(model: PreTrainedModel) -> None:
    """Refuse a student that cannot be trained.

    Raises:
        UnsupportedModelError: its weights are quantized, or all frozen.
    """
    who = type(model).__name__
    coded = next((path for path, module in model.named_modules() if hasattr(module, "coded_weights")), None)
    if coded is not None or quantized_by(model) is not None:
        raise UnsupportedModelError(
            f"KnowledgeDistillation must have a student with float weights, got {who} that is quantized"
            f"{f' ({coded})' if coded else ''}; distil first and quantize last."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"KnowledgeDistillation must have weights to train, and all of {who} are frozen; call "
            f"model.requires_grad_(True)."
        )


def refuse_mismatch(head: Head, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> None:
    """Refuse a teacher that does not answer what the student is asked.

    Raises:
        UnsupportedModelError: another kind of head, other classes, or a vocabulary that lacks tokens.
    """
    theirs = head_of(teacher)
    if theirs != head:
        raise UnsupportedModelError(
            f"teacher and student must have the same kind of head, got {theirs} ({type(teacher).__name__}) and {head} "
            f"({type(student).__name__})."
        )
    if head not in LANGUAGE_MODELS and teacher.config.num_labels != student.config.num_labels:
        raise UnsupportedModelError(
            f"teacher and student must have the same classes, got {teacher.config.num_labels} and "
            f"{student.config.num_labels} labels; give the student the teacher's head."
        )
    common_classes(head, student, teacher, context)


def common_classes(head: Head, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> int | None:
    """Return how many tokens to compare where vocabularies are padded to different sizes; None where they are equal."""
    ours, theirs = (model.config.get_text_config().vocab_size for model in (student, teacher))
    tokens = still_there(context.history, "vocabulary")
    if tokens is not None:
        if len(tokens) != vocabulary_size(student) or tokens[-1] >= vocabulary_size(teacher):
            raise UnsupportedModelError(
                f"a student whose vocabulary was pruned must have the {len(tokens)} tokens that were kept of the "
                f"teacher's, got vocabularies of {theirs} and {ours}; do not resize it between the steps."
            )
        return None
    if context.tokenizer is None or ours == theirs:
        return None
    real = len(context.tokenizer)
    if min(ours, theirs) < real:
        raise UnsupportedModelError(
            f"teacher and student must share the tokenizer's {real} tokens, got vocabularies of {theirs} and {ours}; "
            f"use a student with the teacher's tokenizer."
        )
    return real if head in LANGUAGE_MODELS else None
