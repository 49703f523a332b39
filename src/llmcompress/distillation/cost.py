"""What a training takes, before it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..calibration.effort import activation_bytes
from ..compressor import Context, Outline
from ..data import encode, longest_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Bytes a weight of AdamW's two moments and of gradients; passes of the teacher, the student, and back, which is two.
_MOMENT_BYTES, _GRADIENT_BYTES, _PASSES = 8, 4, 4
# Texts whose length is looked at.
_TRIED = 256


def training_outline(
    student: PreTrainedModel,
    context: Context,
    *,
    epochs: float | None,
    steps: int | None,
    batch_size: int,
    gradient_accumulation: int,
    max_length: int,
) -> Outline:
    """Return what it takes to train `student`, a model without weights, on the data of `context`."""
    rows = len(context.data or ()) * (epochs or 0)
    taken = steps if steps is not None else max(rows / (batch_size * gradient_accumulation), 1)
    tokens = batch_size * min(max_length, longest_input(student) or max_length)
    if context.data and context.tokenizer is not None:
        # Short texts do not fill the rows.
        found = encode(context.data[:_TRIED], context.tokenizer, max_length=max_length)
        mean = sum(len(row["input_ids"]) for row in found) / len(found)
        tokens = min(tokens, int(mean * min(batch_size, len(context.data))) + 1)
    size = student.num_parameters()
    # Activations are gone as gradients come.
    return Outline(
        student,
        scratch=_MOMENT_BYTES * size + max(_GRADIENT_BYTES * size, activation_bytes(student, tokens)),
        flops=_PASSES * 2.0 * size * tokens * gradient_accumulation * taken,
    )
