"""Knowledge distillation: a student learns to answer as the untouched original does (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    Field,
    PlainSerializer,
    PlainValidator,
    SerializeAsAny,
    field_serializer,
    field_validator,
    model_validator,
)

from ..anatomy.vocabulary import vocabulary_size
from ..compressor import Action, Compressor, Context, Need, Rounding, Rounds
from ..errors import ConfigError, MissingInputError
from ..registry import compressors, register
from .alignment import Alignment, align, feature_actions
from .batches import make_rows
from .checks import common_classes, refuse_mismatch, refuse_untrainable
from .heads import Head, head_of
from .labels import check_labels
from .layer_map import LayersField, layer_map
from .loss_choice import Alpha, Features, Soft, SoftLoss, Temperature, reads_of
from .masking import Masking
from .objective import Objective
from .schedule import least, most
from .sources import told
from .student import PlannedStudent, Student, make_student, plan_student, read_student
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

    The loss is `alpha` x soft + (1 - `alpha`) x cross-entropy of the labels (of the next tokens for language models) +
    the `features`, each with its weight. Soft is KL(teacher || student) at the `temperature`, or another of `soft`. A
    regression head has squared errors for both. `alpha=0` without `features` is plain fine-tuning and needs no teacher.
    `alpha`, `temperature` and the weights may be `[start, end]`: they change linearly in the course of the training.

    The model is trained where it is, on its CPU or GPU. Under `accelerate launch` or `torchrun` each process takes its
    share of every step's rows (move the model to the process's own GPU first); all end with the same weights.

    Args:
        epochs: passes over the data; 3 if neither `epochs` nor `steps` is given.
        steps: optimizer steps, instead of `epochs`.
        soft: the loss against the teacher's logits: `"forward_kl"`, `"reverse_kl"`, `"jsd"`, `"skew_kl"`,
            `"skew_reverse_kl"`, `"tvd"` or `"mse"`, or with settings, such as `{"name": "jsd", "beta": 0.1}`; see
            `SoftLoss`.
        temperature: softens teacher and student alike; above 0.
        alpha: weight of the teacher against the labels, in [0, 1]; 1 needs no labels.
        features: weights of losses on what is inside, such as `{"hidden": 1.0}`. `"hidden"` (relative squared error of
            what leaves each block), `"hidden_mse"` (after arXiv 1909.10351), `"hidden_cosine"` (arXiv 1910.01108),
            `"embeddings"` (what enters the first block), `"attention"` (KL of the attention maps, arXiv 2002.10957),
            `"attention_mse"`, `"relations"` (among queries, among keys, among values; arXiv 2012.15828). Hidden states
            of another width are compared through learned projections, which are thrown away afterwards.
        layers: which teacher block each student block is compared with: `"auto"` (by what was kept of the teacher),
            `"uniform"`, `"last"`, a teacher block for each student block such as `(1, 3, 5)`, or pairs of student block
            and teacher block such as `((2, 5),)`.
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
    soft: Soft = Field(SoftLoss(), description="the loss against the teacher's logits")
    temperature: Temperature = Field(2.0, description="divides the logits of teacher and student in the soft loss")
    alpha: Alpha = Field(0.5, description="weight of the soft loss; the hard loss has the rest")
    features: Features = Field({}, description="weights of losses on what is inside, by their names")
    layers: LayersField = Field("auto", description="which teacher block each student block is compared with")
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
        if most(self.alpha) > 0 or reads_of(self.features):
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
        if context.teacher is not None and self.features:
            pairs = layer_map(self.layers, planned.model, context.teacher, context.history, planned=planned.cuts)
            actions.extend(feature_actions(self.features, pairs, planned.model, context.teacher, context.history))
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
        rows = make_rows(
            head, planned.model, tokenizer, data, max_length=self.max_length, labelled=least(self.alpha) < 1
        )
        model = make_student(model, self.student, context)
        objective = Objective(
            head=head,
            soft=self.soft,
            temperature=self.temperature,
            alpha=self.alpha,
            features=self.features,
            alignment=self._align(head, model, teacher, context) if teacher is not None else Alignment(),
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

    def _align(self, head: Head, student: PreTrainedModel, teacher: PreTrainedModel, context: Context) -> Alignment:
        return align(
            teacher,
            context.history,
            pairs=layer_map(self.layers, student, teacher, context.history) if self.features else (),
            classes=common_classes(head, student, teacher, context),
            reads=reads_of(self.features),
        )

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
        refuse_untrainable(model)
        if context.data is not None and least(self.alpha) < 1:
            check_labels(head, model, context.data)
        if head == "regression" and self.soft != SoftLoss():
            raise ConfigError(
                f"KnowledgeDistillation.soft must be left out for the regression of {type(model).__name__}, whose loss "
                f"is the squared error, got {self.soft.name!r}."
            )
        teacher = context.teacher if "teacher" in self.needs else None
        if teacher is not None:
            refuse_mismatch(head, model, teacher, context)
            if self.features:
                layer_map(self.layers, model, teacher, context.history, planned=planned.cuts)
        return head, planned


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
