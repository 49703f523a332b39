"""Knowledge distillation: a student learns to answer as the untouched original does (arXiv 1503.02531)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
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

from ..compressor import Action, Compressor, Context, Cut, Need, Outline, Rounding, Rounds, still_there
from ..errors import ConfigError, MissingInputError
from ..registry import register
from .alignment import Alignment, align, feature_actions
from .arguments import Precision, Training, check_training, use_bf16
from .augmentation import Augmentation
from .batches import collate, make_rows, pad_token, row_length
from .cache import TeacherCache
from .checks import (
    common_classes,
    refuse_mismatch,
    refuse_other_heads,
    refuse_together,
    refuse_uncacheable,
    refuse_unpadded,
    refuse_untrainable,
)
from .cost import training_outline
from .early_stopping import EarlyStopping
from .fake_quantization import read_rounding_step, rounding_action
from .generation import Generation
from .heads import Head, head_of
from .labels import check_labels
from .layer_map import LayersField, layer_map
from .lora import LoRA
from .loss_choice import Alpha, Features, Soft, SoftLoss, Temperature, reads_of
from .masking import masking_for
from .objective import Objective
from .schedule import least, most
from .sources import told
from .student import Student, make_student, outline_student, plan_student, read_student, replaces_model
from .teachers import Teachers, is_original, read_teachers, weights_of
from .teaching import Lesson, PlannedTeacher, Teaching, classes_of, history_of, plan_teachers, teacher_actions
from .ways import Ways, altered_copies, check_ways, check_writer, way_actions
from .zeros import pruned_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_DEFAULT_EPOCHS = 3.0


@register("knowledge_distillation")
class KnowledgeDistillation(Compressor):
    """Train the model to put out what the original puts out (arXiv 1503.02531), on the data given.

    The model is the student: as it arrives (then this recovers what an earlier step lost), with some of its blocks
    (`student="layers:3"`; DistilBERT's way, arXiv 1910.01108), or narrower (`"width:0.5"`). A student may also be a
    model of its own, from a config or a folder. The teacher is the model as it was before any step, or another one, or
    several.
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
            `"skew_reverse_kl"`, `"tvd"`, `"mse"` or `"uld"`, or with settings, such as `{"name": "jsd", "beta": 0.1}`:
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
        teacher: None: the model as it was before any step. Else a folder, a name on the hub or a model; a list of them,
            of which `"original"` may be one; or their weights, as `{"big": 2, "original": 1}`. The probabilities of
            several are averaged. A teacher with another tokenizer reads the texts with it; for tokens, see
            `soft="uld"`.
        cache: a `TeacherCache`, or its dict: the teacher runs over the rows once, and its answers are read from disk.
        learning_rate: of AdamW, falling linearly to 0.
        batch_size: rows a step and process; a row is a text, or a window of `max_length` tokens.
        max_length: tokens a row, cut to what the model can take.
        warmup: share of the steps in which the learning rate rises from 0, in [0, 1).
        weight_decay: of AdamW.
        dropout: share of activations that are dropped in training, in [0, 1); None: as the student's config says.
        gradient_accumulation: batches that make one step.
        gradient_checkpointing: keeps only what enters each block and computes the rest again in the backward pass: less
            memory for the time of one more forward pass.
        lora: `LoRA(rank=8)` or its dict: low-rank changes of the linear layers are trained and added at the end.
        generation: `Generation(way="on_policy")` or its dict: a language model also learns from texts that the teacher
            or it itself wrote.
        augment: `RandomSpans()`, `MaskedWords(model="bert-base-uncased")` or its dict: classifiers and readers of
            questions also learn what the teacher makes of parts of the texts, or of copies with some words replaced.
        early_stopping: `EarlyStopping(task=...)` or its dict: training stops when the student gets no better on a task
            or on rows held out, and the best weights are the result.
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
    teacher: Annotated[Teachers, PlainValidator(read_teachers), PlainSerializer(told)] = Field(
        None, description="another teacher, or several; None: the model as it was before any step"
    )
    cache: TeacherCache | None = Field(None, description="where the teacher's answers are kept")
    learning_rate: float = Field(1e-4, gt=0, description="peak learning rate of AdamW")
    batch_size: int = Field(32, gt=0, description="rows a step and process")
    max_length: int = Field(256, gt=1, description="tokens a row")
    warmup: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(0.01, ge=0, description="weight decay of AdamW")
    dropout: float | None = Field(None, ge=0, lt=1, description="of the student in training; None: its config's own")
    gradient_accumulation: int = Field(1, gt=0, description="batches that make one optimizer step")
    precision: Precision = Field("auto", description="arithmetic of the matrix products")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    lora: LoRA | None = Field(None, description="low-rank changes are trained instead of the weights")
    generation: Generation | None = Field(None, description="training on texts that teacher or student wrote")
    augment: Augmentation | None = Field(None, description="altered copies of the texts, without labels")
    early_stopping: EarlyStopping | None = Field(None, description="when to stop before the end")
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

    @model_validator(mode="after")
    def _ways_that_go_together(self) -> KnowledgeDistillation:
        refuse_together(self)
        return self

    @field_validator("quantize_for", mode="before")
    @classmethod
    def _rounding_step(cls, step: Any) -> Any:
        return read_rounding_step(step)

    @field_serializer("quantize_for")
    def _with_its_name(self, step: Compressor | None) -> dict[str, Any] | None:
        return None if step is None else step.to_dict()

    @property
    def needs(self) -> frozenset[Need]:
        """Data and a tokenizer, and the original where it is a teacher; labels depend on the head, `plan` checks."""
        original = self._asks_teacher and any(is_original(source) for source, _ in weights_of(self.teacher))
        return frozenset({"data", "tokenizer", "teacher"} if original else {"data", "tokenizer"})

    @property
    def begins(self) -> bool:
        """Whether the student is made from a config or comes from elsewhere."""
        return replaces_model(self.student)

    @property
    def reads(self) -> tuple[str, ...]:
        """The folders of teachers, of a student and of the model that alters texts, and the data that decides."""
        sources = [source for source, _ in weights_of(self.teacher)]
        named = [*sources, self.student, getattr(self.augment, "model", None)]
        if self.early_stopping is not None and self.early_stopping.task is not None:
            named.append(self.early_stopping.task.data)
        return tuple(str(one) for one in named if isinstance(one, (str, Path)) and not is_original(str(one)))

    @property
    def _asks_teacher(self) -> bool:
        return most(self.alpha) > 0 or bool(reads_of(self.features)) or self.generation is not None

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Tell which blocks stay, how it is trained, and which zeros are held.

        Raises:
            ConfigError: `student` asks for blocks that the model does not have, or a label is none of its classes.
            MissingInputError: labels are needed and missing.
            UnsupportedModelError: no head that can be distilled, a quantized student, a teacher that does not match.
        """
        lesson = self._check(model, context)
        planned, kept = lesson.student, lesson.student.kept
        actions = list(planned.actions)
        span = f"{self.steps} steps" if self.steps is not None else f"{self.epochs:g} epochs"
        does = f"distil for {span}" if self._asks_teacher else f"fine-tune for {span}"
        trained = "all trainable weights" if self.lora is None else f"{self.lora}, added to the weights at the end"
        actions.append(Action(path="", does=does, reason=trained))
        actions.extend(way_actions(self.generation, self.augment))
        actions.extend(teacher_actions(lesson.teachers, lesson.alignments, lesson.head, self.cache))
        for teacher, aligned in zip(lesson.teachers, lesson.alignments, strict=True):
            history = history_of(teacher, context.history)
            actions.extend(feature_actions(self.features, aligned.pairs, planned.model, teacher.empty, history))
        if self.quantize_for is not None:
            actions.append(rounding_action(self.quantize_for, self._roundings(planned.model)))
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
        # Trainer and accelerate import most of what is installed, for seconds; other steps do without.
        from .train import train

        if not context.data:
            raise MissingInputError("KnowledgeDistillation needs data; pass data=[...] with at least one example.")
        if context.tokenizer is None:
            raise MissingInputError("KnowledgeDistillation needs a tokenizer; pass tokenizer=...")
        if "teacher" in self.needs and (context.teacher is None or context.teacher is model):
            raise MissingInputError(
                "KnowledgeDistillation needs a teacher that is not the student itself; pass the original as "
                "Context.teacher (lc.compress does, without inplace=True)."
            )
        lesson = self._check(model, context)
        head, tokenizer = lesson.head, lesson.student.tokenizer or context.tokenizer
        examples = context.data
        if self.augment is not None:
            examples = [*examples, *altered_copies(examples, self.augment, context, model.device)]
        rows = make_rows(
            head,
            lesson.student.model,
            tokenizer,
            examples,
            max_length=self.max_length,
            labelled=least(self.alpha) < 1,
            joined=self.generation is None,
        )
        model = make_student(model, self.student, context)
        alignments = self._alignments(head, model, lesson.teachers, tokenizer, context)
        objective = Objective(
            head=head,
            soft=self.soft,
            temperature=self.temperature,
            alpha=self.alpha,
            features=self.features,
            alignment=alignments[0] if alignments else Alignment(),
        )
        training = self._training(model, tokenizer, context)
        length = row_length(lesson.student.model, tokenizer, self.max_length)
        ways = Ways(self.generation, head, length, training)
        rows = ways.teacher_rows(rows, lesson.teachers, alignments, context.teacher)
        collator = partial(collate, head, pad=training.pad, decoder_start=training.decoder_start)
        teaching = Teaching(
            planned=lesson.teachers,
            original=context.teacher,
            objective=objective,
            alignments=alignments,
            examples=examples,
            rows=rows,
            tokenizer=tokenizer,
            collator=collator,
            device=model.device,
            autocast=use_bf16(self.precision, model.device),
            max_length=self.max_length,
        )
        with teaching.answering(self.cache, batch_size=self.batch_size, context=context) as teacher:
            course = train(
                model,
                teacher,
                rows,
                objective,
                training,
                collator=collator,
                roundings=self._roundings(model, context),
                masking=masking_for(model, tokenizer) if head == "masked_lm" else None,
                on_policy=ways.on_policy(model),
            )
        context.tell(Action(path="", does=f"train on {len(rows)} rows", reason=str(course)))
        return model

    def outline(self, model: PreTrainedModel, context: Context) -> Outline | None:
        """Cut the student out, or put it in place; training changes no size."""
        student = outline_student(model, self.student, context)
        if student is None:
            return None
        return training_outline(
            student,
            context,
            epochs=self.epochs,
            steps=self.steps,
            batch_size=self.batch_size,
            gradient_accumulation=self.gradient_accumulation,
            max_length=self.max_length,
        )

    def _training(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context) -> Training:
        same = {field.name for field in fields(Training)} & set(type(self).model_fields)
        return Training(
            **{name: getattr(self, name) for name in same},
            pad=pad_token(model, tokenizer),
            decoder_start=getattr(model.config, "decoder_start_token_id", None),
            seed=context.seed,
            progress=context.progress,
            folder=context.work_dir,
            tokenizer=tokenizer,
        )

    def _alignments(
        self,
        head: Head,
        student: PreTrainedModel,
        teachers: Sequence[PlannedTeacher],
        tokenizer: PreTrainedTokenizerBase | None,
        context: Context,
        planned: Sequence[Cut] = (),
    ) -> list[Alignment]:
        """Return how each teacher is laid beside the student; `planned` is what will be cut besides the history."""
        found = []
        for teacher in teachers:
            history = history_of(teacher, context.history)
            pairs = layer_map(self.layers, student, teacher.empty, history, planned=planned) if self.features else ()
            alike = teacher.tokenizer is None
            classes = common_classes(head, student, teacher.empty, tokenizer, history) if alike else None
            found.append(align(teacher.empty, history, pairs=pairs, classes=classes, reads=reads_of(self.features)))
        # Of padded vocabularies only the tokens that all have are compared.
        real = next((one.classes for one in found if one.classes is not None), None)
        return [replace(one, classes=real) for one in found]

    def _roundings(self, model: PreTrainedModel, context: Context | None = None) -> list[Rounding]:
        return self.quantize_for.roundings(model, context) if isinstance(self.quantize_for, Rounds) else []

    def _check(self, model: PreTrainedModel, context: Context) -> Lesson:
        """Refuse all that cannot work; return what student and teachers will be. Reads no weights."""
        head = head_of(model)
        planned = plan_student(model, self.student, context)
        given, model = model, planned.model
        refuse_untrainable(model)
        refuse_unpadded(model)
        check_training(
            model,
            gradient_checkpointing=self.gradient_checkpointing,
            lora=self.lora,
            early_stopping=self.early_stopping,
        )
        check_ways(head, model, self.generation, self.augment)
        if context.data is not None and least(self.alpha) < 1:
            check_labels(head, model, context.data)
        if head == "regression" and self.soft != SoftLoss():
            raise ConfigError(
                f"KnowledgeDistillation.soft must be left out for the regression of {type(model).__name__}, whose loss "
                f"is the squared error, got {self.soft.name!r}."
            )
        tokenizer = planned.tokenizer or context.tokenizer
        teachers = plan_teachers(
            self.teacher if self._asks_teacher else (),
            context.teacher,
            head,
            original_tokenizer=context.tokenizer,
            student_tokenizer=tokenizer,
            pruned_vocabulary=still_there(context.history, "vocabulary") is not None,
            soft=self.soft,
            features=bool(self.features),
        )
        for teacher in teachers:
            if teacher.empty is given and context.teacher is None:
                raise ConfigError(
                    "KnowledgeDistillation.teacher must stay as it is, got the model that inplace=True changes; leave "
                    "inplace out, or pass a copy of it."
                )
            refuse_mismatch(head, model, teacher.empty)
            refuse_unpadded(teacher.empty)
        check_writer(self.generation, teachers)
        alignments = self._alignments(head, model, teachers, tokenizer, context, planned.cuts)
        if "attention" in reads_of(self.features):
            for teacher, aligned in zip(teachers, alignments, strict=True):
                refuse_other_heads(model, teacher.empty, aligned, planned.kept)
        if self.cache is not None and teachers:
            objective = Objective(head, self.soft, self.temperature, self.alpha, self.features, alignments[0])
            classes = classes_of(head, teachers[0].empty, alignments[0])
            own_tokenizer = any(teacher.tokenizer is not None for teacher in teachers)
            refuse_uncacheable(self.cache, objective, classes, own_tokenizer=own_tokenizer)
        return Lesson(head, planned, teachers, alignments)
