"""What is refused before any work: students that cannot be trained, and teachers that do not match them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..anatomy.find import anatomy
from ..anatomy.module_sizes import quantized_by
from ..anatomy.pooling import classifies_last_token
from ..anatomy.vocabulary import rows_needed, vocabulary_size
from ..compressor import Cut, still_there
from ..errors import ConfigError, UnsupportedModelError
from .cache import TeacherCache
from .heads import LANGUAGE_MODELS, Head, head_of
from .loss_choice import reads_of
from .schedule import least, most
from .student import stacks_of
from .teachers import weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .alignment import Alignment
    from .distillation import KnowledgeDistillation
    from .objective import Objective
    from .teaching import PlannedTeacher

_TEACHER = "KnowledgeDistillation.teacher"


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


def refuse_unpadded(model: PreTrainedModel) -> None:
    """Refuse a classifier that finds the end of a text by a padding token that its config does not name.

    Raises:
        ConfigError: it is one.
    """
    if model.config.get_text_config().pad_token_id is None and classifies_last_token(model):
        raise ConfigError(
            f"KnowledgeDistillation must have a padding token in the config of {type(model).__name__}, which finds the "
            f"end of each text of a batch by it; set model.config.pad_token_id = tokenizer.pad_token_id."
        )


def refuse_mismatch(head: Head, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuse a teacher that does not answer what the student is asked.

    Raises:
        UnsupportedModelError: another kind of head, other classes, or the same in another order.
    """
    theirs = head_of(teacher)
    if theirs != head:
        raise UnsupportedModelError(
            f"{_TEACHER} and student must have the same kind of head, got {theirs} "
            f"({type(teacher).__name__}) and {head} ({type(student).__name__}); name a teacher with a head for {head}."
        )
    if head in LANGUAGE_MODELS:
        return
    if teacher.config.num_labels != student.config.num_labels:
        raise UnsupportedModelError(
            f"{_TEACHER} and student must have the same classes, got {teacher.config.num_labels} and "
            f"{student.config.num_labels} labels; give the student the teacher's head."
        )
    names, other = _labels(student), _labels(teacher)
    # What transformers calls LABEL_0 has no name that would tell what it is.
    if names != other and set(names) == set(other) and not all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        raise UnsupportedModelError(
            f"{_TEACHER} and student must have their classes in the same order, got {other[:8]} and "
            f"{names[:8]}; put the rows of one head's weight and bias, and its config.id2label and label2id, into the "
            f"order of the other's."
        )


def _labels(model: PreTrainedModel) -> list[str]:
    """Return the names of the classes in the order of their numbers."""
    return [str(name) for _, name in sorted((int(number), name) for number, name in model.config.id2label.items())]


def common_classes(
    head: Head,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    history: Sequence[Cut],
) -> int | None:
    """Return how many tokens to compare where vocabularies are padded to different sizes; None where they are equal.

    Args:
        head: of both.
        student: its vocabulary may have been cut out of the teacher's.
        teacher: reads with the same tokenizer.
        tokenizer: of both.
        history: what was cut of the teacher to make the student.

    Raises:
        UnsupportedModelError: a vocabulary lacks tokens.
    """
    ours, theirs = (model.config.get_text_config().vocab_size for model in (student, teacher))
    tokens = still_there(history, "vocabulary")
    if tokens is not None:
        if len(tokens) != vocabulary_size(student) or tokens[-1] >= vocabulary_size(teacher):
            raise UnsupportedModelError(
                f"a student whose vocabulary was pruned must have the {len(tokens)} tokens that were kept of the "
                f"teacher's, got vocabularies of {theirs} and {ours}; do not resize it between the steps."
            )
        return None
    if tokenizer is None or ours == theirs:
        return None
    # Ids may have holes: there are fewer tokens than the highest one says.
    real = rows_needed(tokenizer)
    if min(ours, theirs) < real:
        raise UnsupportedModelError(
            f"{_TEACHER} and student must share the ids up to {real - 1} of the tokenizer's {len(tokenizer)} tokens, "
            f"got vocabularies of {theirs} and {ours}; use a student with the teacher's tokenizer."
        )
    return real if head in LANGUAGE_MODELS else None


def refuse_other_heads(
    student: PreTrainedModel, teacher: PreTrainedModel, alignment: Alignment, kept: Mapping[str, Sequence[int]]
) -> None:
    """Refuse attention maps of other numbers of heads, as far as the models' anatomy tells them.

    Args:
        student: before blocks of it go.
        teacher: may have no weights.
        alignment: which blocks are compared, and which of the teacher's heads are left.
        kept: the student's blocks that stay, by path of the stack, where some go.

    Raises:
        UnsupportedModelError: naming the first two blocks that differ.
    """
    try:
        ours, theirs = anatomy(student).stacks, anatomy(teacher).stacks
    except UnsupportedModelError:
        return  # the maps of the first rows will show
    for stack, pairs in enumerate(alignment.pairs):
        blocks = ours[stack]
        stay = kept.get(blocks[0].path.rpartition(".")[0], range(len(blocks)))
        for own, other in pairs:
            sides = (blocks[stay[own]], theirs[stack][other])
            mine, whole = (next((part for part in block.attentions if not part.cross), None) for block in sides)
            if mine is None or whole is None:
                continue
            left = alignment.heads.get((stack, other))
            refuse_unequal_maps(own, other, mine.heads, whole.heads if left is None else len(left))


def refuse_unequal_maps(own: int, other: int, few: int, many: int) -> None:
    """Refuse to compare the attention maps of block `own` of the student with those of block `other` of the teacher.

    Raises:
        UnsupportedModelError: the student's block has `few` heads, and the teacher's `many`.
    """
    if few != many:
        raise UnsupportedModelError(
            f"attention maps must be of as many heads in teacher and student to be compared, got {many} in the "
            f"teacher's block {other} and {few} in the student's block {own}; use features={{'relations': 1.0}}, "
            f"which need no equal heads."
        )


def refuse_uncacheable(
    cache: TeacherCache,
    objective: Objective,
    classes: int,
    *,
    own_tokenizer: bool,
) -> None:
    """Refuse what a cache of answers cannot serve.

    Args:
        cache: the cache.
        objective: what is learned, with the blocks that are compared.
        classes: how many of the teacher's are compared.
        own_tokenizer: whether the teacher reads with another tokenizer than the student.

    Raises:
        ConfigError: inputs that are made anew each time, features or hidden states that it does not keep, a temperature
            that changes or a loss on logits where only the likeliest tokens are kept.
    """
    who, head = "KnowledgeDistillation.cache", objective.head
    folder = Path(cache.folder).absolute()
    file = next((path for path in (folder, *folder.parents) if path.exists() and not path.is_dir()), None)
    if file is not None:
        raise ConfigError(
            f"TeacherCache.folder must be a folder, got {cache.folder!r}, and {file} is a file; name another one."
        )
    if head == "masked_lm":
        raise ConfigError(
            f"{who} must be left out for a masked language model, whose inputs are masked anew each time."
        )
    if head == "causal_lm" and own_tokenizer:
        raise ConfigError(f"{who} must be left out where the teacher's tokenizer is another one than the student's.")
    missing = objective.reads & {"attention", "relations"}
    if missing:
        raise ConfigError(f"{who} keeps no {' and no '.join(sorted(missing))}; leave it out, or use features='hidden'.")
    wanted = {theirs + 1 for pairs in objective.alignment.pairs for _, theirs in pairs if "states" in objective.reads}
    wanted |= {0} if "embeddings" in objective.reads else set()
    if not wanted <= set(cache.hidden):
        raise ConfigError(
            f"TeacherCache.hidden must hold the hidden states {tuple(sorted(wanted))}, which features compare, got "
            f"{cache.hidden}."
        )
    if cache.keeps_all(head, classes):
        return
    if isinstance(objective.temperature, tuple):
        raise ConfigError(
            f"KnowledgeDistillation.temperature must be one number where only {cache.top_k} of {classes} tokens are "
            f"kept, got {list(objective.temperature)}; raise top_k, or leave the cache out."
        )
    if objective.soft.name in ("mse", "uld"):
        raise ConfigError(
            f"KnowledgeDistillation.soft must be a loss between probabilities of tokens where only {cache.top_k} of "
            f"{classes} are kept, got {objective.soft.name!r}; raise top_k, or leave the cache out."
        )


def refuse_missing_states(cache: TeacherCache, teachers: Sequence[PlannedTeacher]) -> None:
    """Refuse to keep hidden states that the teachers do not have for the rows of the student.

    Raises:
        ConfigError: there are several teachers, or the one has another tokenizer or too few blocks.
    """
    if not cache.hidden:
        return
    if len(teachers) > 1 or teachers[0].tokenizer is not None:
        raise ConfigError(
            f"TeacherCache.hidden must be left out with several teachers, or one with another tokenizer, got "
            f"{cache.hidden} and {' and '.join(teacher.name for teacher in teachers)}."
        )
    model = teachers[0].empty
    config = model.config.get_text_config()
    blocks = None if model.config.is_encoder_decoder else getattr(config, "num_hidden_layers", None)
    last = min(map(len, stacks_of(model))) if blocks is None else int(blocks)
    if cache.hidden[-1] > last:
        raise ConfigError(
            f"TeacherCache.hidden must name hidden states from 0 to {last} of a teacher with {last} blocks "
            f"({type(model).__name__}), got {cache.hidden}."
        )


def refuse_together(step: KnowledgeDistillation) -> None:
    """Refuse fields that do not go together.

    Raises:
        ConfigError: naming them.
    """
    who = "KnowledgeDistillation"
    if step.lora is not None and step.quantize_for is not None:
        raise ConfigError(
            f"{who} must have lora or quantize_for, got both: weights that stay as they are cannot learn to be rounded."
        )
    if step.layers != "auto" and not reads_of(step.features) - {"embeddings"}:
        raise ConfigError(
            f"{who}.layers must be left out where no feature compares blocks, got layers={step.layers!r} with "
            f"features={step.features!r}; add for instance features={{'hidden': 1.0}}, or name the blocks that stay as "
            f"student='layers:0,2,5'."
        )
    several = len(weights_of(step.teacher))
    if step.generation is not None and step.generation.way == "sequence" and several > 1:
        raise ConfigError(
            f"{who}.generation must have one teacher to write, got {several} of them; name one, or use way='on_policy'."
        )
    unasked = [name for name in ("teacher", "cache") if getattr(step, name) is not None]
    if unasked and most(step.alpha) == 0 and not reads_of(step.features) and step.generation is None:
        raise ConfigError(
            f"{who}.{unasked[0]} must be left out where no teacher is asked, with alpha={step.alpha!r} and without "
            f"features, got {getattr(step, unasked[0])!r:.80}; raise alpha, or name features."
        )
    on_policy = step.generation is not None and step.generation.way == "on_policy"
    if (on_policy or step.augment is not None) and least(step.alpha) == 0 and not step.features:
        raise ConfigError(
            f"{who}.alpha must be above 0 on policy and for copies, which the teacher judges alone, got {step.alpha!r}."
        )
    if on_policy and step.cache is not None:
        raise ConfigError(f"{who}.cache must be left out on policy, where texts are written anew.")
