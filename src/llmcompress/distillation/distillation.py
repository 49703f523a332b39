"""Knowledge distillation: a student learns to answer as the untouched original does (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    field_serializer,
    field_validator,
    model_validator,
)

from ..anatomy.module_sizes import quantized_by
from ..anatomy.vocabulary import vocabulary_size
from ..compressor import Action, Compressor, Context, Need, Rounding, Rounds, still_there
from ..errors import ConfigError, MissingInputError, UnsupportedModelError
from ..registry import compressors, register
from .batches import make_rows
from .heads import LANGUAGE_MODELS, Head, head_of
from .labels import check_labels
from .masking import Masking
from .objective import Objective
from .sources import told
from .student import PlannedStudent, Student, layer_map, make_student, plan_student, read_student
from .trainer import Precision, train
from .zeros import pruned_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DEFAULT_EPOCHS = 3.0


@register("knowledge_distillation")
class KnowledgeDistillation(Compressor):
    """Train the model to put out what the original puts out (arXiv 1503.02531), on the data given.

    The model is the student: as it arrives (then this recovers what an earlier step lost), with some of its blocks
    (`student="layers:3"`; DistilBERT's way, arXiv 1910.01108), or narrower (`"width:0.5"`). A student may also be a
    model of its own, from a config or a folder. The teacher is the model as it was before any step.
    Weights that an earlier step set to zero stay zero. Classifiers (of one class, a set of classes or a score), taggers
    of words and readers of questions learn from their texts (and labels) one by one; masked language models from what
    is masked in each text; causal ones from windows cut out of all texts joined, or from each text's second one as its
    continuation; encoder-decoder models from text to second text.

    The loss is `alpha` x KL(teacher || student) at the `temperature` + (1 - `alpha`) x cross-entropy of the labels (of
    the next tokens for language models) + `hidden` x the relative squared error of the hidden states. A regression head
    has squared errors for both. `alpha=0` with `hidden=0` is plain fine-tuning and needs no teacher.

    The model is trained where it is, on its CPU or GPU. Under `accelerate launch` or `torchrun` each process takes its
    share of every step's rows (move the model to the process's own GPU first); all end with the same weights.

    Args:
        epochs: passes over the data; 3 if neither `epochs` nor `steps` is given.
        steps: optimizer steps, instead of `epochs`.
        temperature: softens teacher and student alike; above 0.
        alpha: weight of the teacher against the labels, in [0, 1]; 1 needs no labels.
        hidden: weight of the hidden states' error (after arXiv 1909.10351); 0 leaves it out.
        student: None: the model as it arrives. Parts of it: `"layers:3"` (3 blocks evenly spaced, first and last among
            them), `"layers:0,2,5"`, or `"width:0.5"` (that share of hidden features, heads and feed-forward channels,
            the dearest by their gradients; what cannot be narrower is told in the plan). From scratch: a config, as a
            dict or a `.json` file; without `model_type` the model's own with those fields changed. From elsewhere: a
            folder, a name on the hub or a model; its tokenizer comes with it.
        learning_rate: of AdamW, falling linearly to 0.
        batch_size: rows a step and process; a row is a text, or a window of `max_length` tokens.
        max_length: tokens a row, cut to what the model can take.
        warmup: share of the steps in which the learning rate rises from 0, in [0, 1).
        weight_decay: of AdamW.
        gradient_accumulation: batches that make one step.
        precision: `"bf16"` multiplies in bfloat16, `"fp32"` does not; `"auto"` takes bf16 where the hardware has it.
        quantize_for: a step such as `WeightOnlyQuantization(bits=3)`, or its dict: the student computes with weights
            (and activations) rounded as that step will round them, and learns to make up for it (quantization-aware
            training). Put the same step behind this one: it stores exactly what was trained.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model, tiny_tokenizer
        >>> step = lc.KnowledgeDistillation(steps=2, student="layers:1", alpha=1.0, max_length=16)
        >>> texts = ["a cat sat", "a dog ran"]
        >>> result = lc.compress(tiny_model("bert"), step, data=texts, tokenizer=tiny_tokenizer(), progress=False)
        >>> result.model.config.num_hidden_layers
        1
    """

    epochs: float | None = Field(None, gt=0, description="passes over the data; 3 if steps is not given either")
    steps: int | None = Field(None, gt=0, description="optimizer steps, instead of epochs")
    temperature: float = Field(2.0, gt=0, description="divides the logits of teacher and student in the soft loss")
    alpha: float = Field(0.5, ge=0, le=1, description="weight of the soft loss; the hard loss has the rest")
    hidden: float = Field(0.0, ge=0, description="weight of the hidden states' relative squared error")
    student: Annotated[Student, PlainValidator(read_student), PlainSerializer(told)] = Field(
        None, description="part of the model, a config, or another model; None: the model as it arrives"
    )
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    batch_size: int = Field(32, gt=0, description="rows a step and process")
    max_length: int = Field(256, gt=1, description="tokens a row")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    gradient_accumulation: int = Field(1, gt=0, description="batches that make one optimizer step")
    precision: Precision = Field("auto", description="arithmetic of the matrix products")
    quantize_for: SerializeAsAny[Compressor] | None = Field(None, description="the quantization step to train for")

    @model_validator(mode="before")
    @classmethod
    def _one_duration(cls, fields: Any) -> Any:
        if isinstance(fields, dict):
            epochs, steps = fields.get("epochs"), fields.get("steps")
            if epochs is not None and steps is not None:
                raise ConfigError(
                    f"KnowledgeDistillation must have epochs or steps, got both (epochs={epochs!r}, steps={steps!r})."
                )
            if epochs is None and steps is None:
                return {**fields, "epochs": _DEFAULT_EPOCHS}
        return fields

    @field_validator("quantize_for", mode="before")
    @classmethod
    def _rounding_step(cls, step: Any) -> Any:
        if isinstance(step, (Mapping, str)):
            step = compressors.create(step)
        if step is not None and not (isinstance(step, Compressor) and isinstance(step, Rounds)):
            raise ConfigError(
                f"KnowledgeDistillation.quantize_for must be a step that rounds each weight by itself, such as "
                f"WeightOnlyQuantization or DynamicQuantization, got {step!r}."
            )
        return step

    @field_serializer("quantize_for")
    def _with_its_name(self, step: Compressor | None) -> dict[str, Any] | None:
        return None if step is None else step.to_dict()

    @property
    def needs(self) -> frozenset[Need]:
        """Data and a tokenizer, and the teacher unless nothing asks it; labels depend on the head, `plan` checks."""
        needs: set[Need] = {"data", "tokenizer"}
        if self.alpha > 0 or self.hidden > 0:
            needs.add("teacher")
        return frozenset(needs)

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Tell which blocks stay, how it is trained, and which zeros are held.

        Raises:
            ConfigError: `student` asks for blocks that the model does not have, or a label is none of its classes.
            MissingInputError: labels are needed and missing.
            UnsupportedModelError: no head that can be distilled, a quantized student, a teacher that does not match.
        """
        _, planned = self._check(model, context)
        actions, kept = list(planned.actions), planned.kept
        span = f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"
        does = f"distil for {span}" if "teacher" in self.needs else f"fine-tune for {span}"
        actions.append(Action(path="", does=does, reason="all trainable weights"))
        if self.quantize_for is not None:
            actions.append(self._rounding_action(planned.model))
        if planned.model is not model:
            return actions
        stay = tuple(f"{path}.{index}." for path, indices in kept.items() for index in indices)
        held = [
            int(zero.sum())
            for name, _, zero in pruned_weights(model)
            if name.startswith(stay) or not any(name.startswith(f"{path}.") for path in kept)
        ]
        if held:
            actions.append(Action(path="", does=f"hold {sum(held)} zeros in {len(held)} weights"))
        return actions

    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Make the student out of `model`, train it in place, and return it."""
        data, tokenizer, teacher = context.data, context.tokenizer, context.teacher
        if not data:
            raise MissingInputError("KnowledgeDistillation needs data; pass data=[...] with at least one example.")
        if tokenizer is None:
            raise MissingInputError("KnowledgeDistillation needs a tokenizer; pass tokenizer=...")
        if "teacher" not in self.needs:
            teacher = None
        elif teacher is None or teacher is model:
            raise MissingInputError(
                "KnowledgeDistillation needs a teacher that is not the student itself; pass the original as "
                "Context.teacher (lc.compress does, without inplace=True)."
            )
        head, planned = self._check(model, context)
        tokenizer = planned.tokenizer or tokenizer
        rows = make_rows(head, planned.model, tokenizer, data, max_length=self.max_length, labelled=self.alpha < 1)
        model = make_student(model, self.student, context)
        objective = Objective(
            head=head,
            temperature=self.temperature,
            alpha=self.alpha,
            hidden=self.hidden,
            layers=layer_map(model, teacher, context.history) if teacher is not None and self.hidden > 0 else (),
            classes=_common_classes(head, model, teacher, context) if teacher is not None else None,
            tokens=_tensor(still_there(context.history, "vocabulary")),
            features=_tensor(still_there(context.history, "hidden")),
        )
        roundings = self._roundings(model)
        losses = train(
            model,
            teacher,
            rows,
            objective,
            pad=_pad_token(model, tokenizer),
            decoder_start=getattr(model.config, "decoder_start_token_id", None),
            epochs=self.epochs,
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            gradient_accumulation=self.gradient_accumulation,
            precision=self.precision,
            seed=context.seed,
            progress=context.progress,
            roundings=roundings,
            remake=_masking(model, tokenizer) if head == "masked_lm" else None,
        )
        course = " -> ".join(f"{loss:.4g}" for loss in losses)
        context.tell(Action(path="", does=f"train on {len(rows)} rows", reason=f"loss {course}"))
        return model

    def _roundings(self, model: PreTrainedModel) -> list[Rounding]:
        return self.quantize_for.roundings(model) if isinstance(self.quantize_for, Rounds) else []

    def _rounding_action(self, model: PreTrainedModel) -> Action:
        roundings = self._roundings(model)
        inputs = sum(rounding.inputs is not None for rounding in roundings)
        return Action(
            path="",
            does=f"train {len(roundings)} weights rounded as {self.quantize_for} will"
            + (f", and the inputs of {inputs} layers" if inputs else ""),
            reason="put that step behind this one",
        )

    def _check(self, model: PreTrainedModel, context: Context) -> tuple[Head, PlannedStudent]:
        """Refuse all that cannot work; return the head and what the student will be. Reads no weights."""
        head = head_of(model)
        planned = plan_student(model, self.student, context)
        model = planned.model
        _refuse_untrainable(model)
        if context.data is not None and self.alpha < 1:
            check_labels(head, model, context.data)
        teacher = context.teacher if "teacher" in self.needs else None
        if teacher is not None:
            _refuse_mismatch(head, model, teacher, context)
            if self.hidden > 0:
                _refuse_widths(model, teacher, context)
                layer_map(model, teacher, context.history)
        return head, planned


def _refuse_untrainable(model: PreTrainedModel) -> None:
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


def _refuse_mismatch(head: Head, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> None:
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
    _common_classes(head, student, teacher, context)


def _refuse_widths(student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> None:
    if still_there(context.history, "hidden") is not None:
        return  # which of the teacher's features the student's are is known
    ours, theirs = (getattr(model.config.get_text_config(), "hidden_size", None) for model in (student, teacher))
    if ours != theirs:
        raise UnsupportedModelError(
            f"hidden states of teacher and student must be equally wide to be compared, got {theirs} and {ours}; "
            f"use hidden=0."
        )


def _tensor(indices: tuple[int, ...] | None) -> torch.Tensor | None:
    return None if indices is None else torch.tensor(indices)


def _common_classes(head: Head, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> int | None:
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


def _masking(model: PreTrainedModel, tokenizer: Any) -> Masking:
    if tokenizer.mask_token_id is None:
        raise MissingInputError(
            f"KnowledgeDistillation needs a tokenizer with a mask token for {type(model).__name__}, got "
            f"{type(tokenizer).__name__} without one; pass the tokenizer that the model was trained with."
        )
    return Masking(tokenizer.mask_token_id, vocabulary_size(model))


def _pad_token(model: PreTrainedModel, tokenizer: Any) -> int:
    pads = (model.config.get_text_config().pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    # Padding is masked, so that any token serves where none is set aside for it.
    return next((pad for pad in pads if pad is not None), 0)
