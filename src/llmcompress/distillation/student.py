"""Students: parts of their teacher, models of their own from a config, or smaller siblings from elsewhere."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
import transformers

from ..anatomy.depth import evenly_spaced, keep_blocks, plan_depth
from ..anatomy.empty import empty_of_class, weightless
from ..anatomy.footprint import footprint
from ..anatomy.stacks import Stack, find_stacks
from ..anatomy.vocabulary import rows_needed, vocabulary_size
from ..compressor import Action, Context, Cut
from ..errors import ConfigError, UnsupportedModelError
from .narrow import narrowing, parse_width
from .sibling import class_from, config_fields, empty_sibling
from .sources import InMemory, Source, load_with_head, read_source, reads_alike, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Student: TypeAlias = str | InMemory | dict[str, Any] | None
"""What the field may hold: part of the model, another model, the fields of a config."""

_WHO = "KnowledgeDistillation.student"
_FORMS = (
    "'layers:3' (how many blocks, evenly spaced), 'layers:0,2,5' (which blocks), 'width:0.5' (share of each width), a "
    "config (a dict or a .json file), a folder, a name on the hub, or a model"
)


def read_student(value: Any) -> Student:
    """Return what the field `student` holds, checked as far as it can be without the model.

    Raises:
        ConfigError: it is none of the forms, or a malformed one.

    Example:
        >>> read_student("layers:3"), read_student({"num_hidden_layers": 2})
        ('layers:3', {'num_hidden_layers': 2})
    """
    if value is None:
        return None
    if isinstance(value, transformers.PreTrainedConfig):
        return {**value.to_diff_dict(), "model_type": value.model_type}
    if isinstance(value, Mapping) and "in_memory" not in value:
        if not value or not all(isinstance(key, str) for key in value):
            raise ConfigError(f"{_WHO} must be {_FORMS}, got {value!r}.")
        return dict(value)
    if isinstance(value, str):
        if _is_form(value, "width"):
            parse_width(value)
        elif _is_form(value, "layer"):
            parse_blocks(value)
        elif not value.strip() or (":" in value and not Path(value).exists()):
            raise ConfigError(f"{_WHO} must be {_FORMS}, got {value!r}.")
        return value
    return read_source(value, _WHO)


@dataclass(frozen=True)
class PlannedStudent:
    """What `make_student` is about to do.

    Attributes:
        model: the student, where it is another model without its weights; the model itself where it is a part of it.
        actions: for the plan.
        kept: block indices that stay, by path of the stack, where some go.
        tokenizer: the student's own where it brings one that reads differently, or None.
    """

    model: PreTrainedModel
    actions: list[Action]
    kept: dict[str, tuple[int, ...]]
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def cuts(self) -> list[Cut]:
        """The blocks that will go, as `context.history` will tell them."""
        return [Cut(path, "layers", blocks, len(self.model.get_submodule(path))) for path, blocks in self.kept.items()]


def plan_student(model: PreTrainedModel, student: Student, context: Context) -> PlannedStudent:
    """Tell what the student will be; reads no weight of it and changes nothing.

    Raises:
        ConfigError: it asks for blocks that are not there; there is no such folder; a config of it cannot be built; an
            earlier step changed the model whose place it takes.
        UnsupportedModelError: blocks that cannot stand alone, no width that can be cut, a vocabulary that does not hold
            the tokens.
    """
    if student is None:
        return PlannedStudent(model, [], {})
    if _keeps_blocks(student):
        kept = choose_blocks(model, student)
        plan_depth(model, kept)
        numbers = {path: ", ".join(map(str, indices)) for path, indices in kept.items()}
        actions = [
            Action(path=path, does=f"keep {len(kept[path])} of {len(model.get_submodule(path))} blocks: {told}")
            for path, told in numbers.items()
        ]
        return PlannedStudent(model, actions, kept)
    if _narrows(student):
        return PlannedStudent(model, narrowing(model, student, context)[1], {})
    if context.history:
        raise ConfigError(
            f"{_WHO} takes the place of the whole model, got {student!r} behind a step that cut the model; put it "
            f"first, and cut the student afterwards."
        )
    fields = config_fields(student, _WHO)
    if fields is not None:
        built = empty_of_class(*class_from(model, fields, _WHO))
        does, tokenizer = "draw the weights of a new", None
    else:
        assert not isinstance(student, dict)
        built = empty_sibling(model, student, _WHO)
        does, tokenizer = f"begin from {student!r}:", _own_tokenizer(student, context)
    known = tokenizer or context.tokenizer
    tokens = rows_needed(known) if known is not None else 0
    if vocabulary_size(built) < tokens:
        raise UnsupportedModelError(
            f"{_WHO} must have an embedding for each of the {tokens} tokens of its tokenizer, got "
            f"{vocabulary_size(built)} in {type(built).__name__}; choose a student with the tokenizer's vocabulary."
        )
    size = f"{type(built).__name__} of {footprint(built).parameters / 1e6:.3g} M parameters"
    reason = "its own tokenizer goes with it" if tokenizer is not None else None
    return PlannedStudent(built, [Action(path="", does=f"{does} {size}", reason=reason)], {}, tokenizer)


def replaces_model(student: Student) -> bool:
    """Tell whether a student is no part of the model that arrives: it is drawn from a config, or comes from elsewhere.

    Example:
        >>> [replaces_model(student) for student in (None, "layers:2", "width:0.5", {"num_hidden_layers": 1}, "folder")]
        [False, False, False, True, True]
    """
    return student is not None and not _keeps_blocks(student) and not _narrows(student)


def make_student(model: PreTrainedModel, student: Student, context: Context) -> PreTrainedModel:
    """Return the student, with its weights, in eval mode and where `model` is.

    Args:
        model: a copy of the teacher, or what earlier steps left of it; a student that is part of it is cut out of it in
            place.
        student: None leaves the model as it is; else as `read_student` returned it.
        context: its `history` is told what was cut; its `seed` draws what is random; a student from elsewhere brings
            its tokenizer.

    Raises:
        ConfigError: as `plan_student`.
        UnsupportedModelError: as `plan_student`.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> context = Context()
        >>> make_student(tiny_model("bert"), "layers:1", context).config.num_hidden_layers
        1
        >>> context.history
        [Cut(path='bert.encoder.layer', axis='layers', kept=(0,), of=2)]
    """
    if student is None:
        return model
    if _keeps_blocks(student):
        context.history.extend(keep_blocks(model, choose_blocks(model, student)))
        return model
    if _narrows(student):
        return narrowing(model, student, context)[0].compress(model, context)
    planned = plan_student(model, student, context)
    fields = config_fields(student, _WHO)
    drawn: list[str] = []
    with torch.random.fork_rng():
        torch.manual_seed(context.seed)
        if fields is not None:
            cls, config = class_from(model, fields, _WHO)
            made = cls(config).float().eval()
        elif isinstance(student, InMemory):
            made = copy.deepcopy(student.model).eval()
        else:
            made, drawn = load_with_head(str(student), _WHO, like=model)
    if drawn:
        modules = ", ".join(sorted({name.rpartition(".")[0] for name in drawn}))
        context.tell(Action(path=modules, does="draw at random", reason=f"{student!r} has no weights for it"))
    if planned.tokenizer is not None:
        context.replace_tokenizer(planned.tokenizer)
    return made.to(model.device)


def outline_student(model: PreTrainedModel, student: Student, context: Context) -> PreTrainedModel | None:
    """Return the student without weights, `model` having none; arguments as for `make_student`.

    None where the step that narrows it does not foretell its sizes.
    """
    if student is None:
        return model
    if _keeps_blocks(student):
        context.history.extend(keep_blocks(model, choose_blocks(model, student)))
        return model
    if _narrows(student):
        outline = narrowing(model, student, context)[0].outline(model, context)
        return None if outline is None else outline.model
    planned = plan_student(model, student, context)
    if planned.tokenizer is not None:
        context.replace_tokenizer(planned.tokenizer)
    if isinstance(student, InMemory):
        return weightless(planned.model)
    return planned.model.float().eval()


def parse_blocks(spec: str) -> int | tuple[int, ...]:
    """Return how many blocks `"layers:3"` keeps, or which ones `"layers:0,2,5"` names; `"layers:2,"` names one.

    Raises:
        ConfigError: `spec` is of neither form, keeps nothing, or its indices do not ascend.

    Example:
        >>> parse_blocks("layers:3"), parse_blocks("layers:0,2,5"), parse_blocks("layers:2,")
        (3, (0, 2, 5), (2,))
    """
    form = "'layers:3' (how many blocks, evenly spaced) or 'layers:0,2,5' (which blocks)"
    match = re.fullmatch(r"layers:(\d+(?:,\d+)*,?)", spec.replace(" ", ""))
    if match is None:
        raise ConfigError(f"KnowledgeDistillation.student must be {form}, got {spec!r}.")
    numbers = tuple(int(number) for number in match[1].split(",") if number)
    if "," not in match[1]:
        if numbers[0] == 0:
            raise ConfigError(
                f"KnowledgeDistillation.student must keep at least one block, got {spec!r}; block 0 alone is "
                f"'layers:0,'."
            )
        return numbers[0]
    if any(later <= earlier for earlier, later in pairwise(numbers)):
        raise ConfigError(f"KnowledgeDistillation.student must name blocks once, in ascending order, got {spec!r}.")
    return numbers


def choose_blocks(model: PreTrainedModel, spec: str) -> dict[str, tuple[int, ...]]:
    """Return the block indices that `spec` keeps of each stack of `model`, by the stack's path.

    A count keeps evenly spaced blocks, the first and the last among them. Both stacks of an encoder-decoder are cut.

    Raises:
        ConfigError: `spec` is malformed, or asks for more blocks than there are, or for one outside the model.
        UnsupportedModelError: the model has no stack of blocks.
    """
    wanted = parse_blocks(spec)
    kept = {}
    for stack in stacks_of(model):
        where = f"{stack.path} of {type(model).__name__} has {len(stack)} blocks"
        if isinstance(wanted, int):
            if wanted > len(stack):
                raise ConfigError(f"KnowledgeDistillation.student must keep what is there, got {spec!r}; {where}.")
            kept[stack.path] = evenly_spaced(len(stack), wanted)
        else:
            if wanted[-1] >= len(stack):
                raise ConfigError(f"KnowledgeDistillation.student must name its blocks, got {spec!r}; {where}.")
            kept[stack.path] = wanted
    return kept


def stacks_of(model: PreTrainedModel) -> list[Stack]:
    """Return the stacks of blocks, an encoder's before its decoder's.

    Raises:
        UnsupportedModelError: there is none.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} must have repeated blocks in a ModuleList, and none were found; use student=None "
            f"and features={{}}."
        )
    return stacks


def _keeps_blocks(student: Student) -> TypeGuard[str]:
    return _is_form(student, "layers")


def _narrows(student: Student) -> TypeGuard[str]:
    return _is_form(student, "width")


def _is_form(student: Student, form: str) -> bool:
    """Tell `"layers:3"` from a folder that happens to be called so."""
    return isinstance(student, str) and student.lstrip().startswith(form) and not Path(student).exists()


def _own_tokenizer(source: Source, context: Context) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer that lies beside the student, where it does not read as the one at hand."""
    found = tokenizer_of(source)
    if found is None or context.tokenizer is None or reads_alike(found, context.tokenizer):
        return None
    return found
