"""Students made from their teacher: which blocks stay, and which teacher layers each student layer answers for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from ..anatomy.depth import evenly_spaced, keep_blocks, origins
from ..anatomy.stacks import Stack, find_stacks
from ..compressor import Cut
from ..errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def parse_student(spec: str) -> int | tuple[int, ...]:
    """Return how many blocks `"layers:3"` keeps, or which ones `"layers:0,2,5"` names.

    Raises:
        ConfigError: `spec` is of neither form, keeps nothing, or its indices do not ascend.

    Example:
        >>> parse_student("layers:3"), parse_student("layers:0,2,5")
        (3, (0, 2, 5))
    """
    form = "'layers:3' (how many blocks, evenly spaced) or 'layers:0,2,5' (which blocks)"
    match = re.fullmatch(r"layers:(\d+(?:,\d+)*,?)", spec.replace(" ", ""))
    if match is None:
        raise ConfigError(f"KnowledgeDistillation.student must be {form}, got {spec!r}.")
    numbers = tuple(int(number) for number in match[1].split(",") if number)
    if "," not in match[1]:
        if numbers[0] == 0:
            raise ConfigError(f"KnowledgeDistillation.student must keep at least one block, got {spec!r}.")
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
    wanted = parse_student(spec)
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


def make_student(model: PreTrainedModel, spec: str | None) -> list[Cut]:
    """Turn `model` into the student that `spec` describes, in place, its weights being those of the kept blocks.

    Args:
        model: a copy of the teacher, or what earlier steps left of it.
        spec: None leaves the model as it is; `"layers:3"` keeps 3 blocks evenly spaced, the first and the last among
            them; `"layers:0,2,5"` keeps those.

    Returns:
        One `Cut` a stack, for `context.history`; none where `spec` is None.

    Raises:
        ConfigError: as `choose_blocks`.
        UnsupportedModelError: the blocks kept cannot stand alone, or no plain config can tell of them.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> student = tiny_model("bert")
        >>> make_student(student, "layers:1")
        [Cut(path='bert.encoder.layer', axis='layers', kept=(0,), of=2)]
        >>> student.config.num_hidden_layers
        1
    """
    return keep_blocks(model, choose_blocks(model, spec)) if spec is not None else []


def layer_map(student: PreTrainedModel, teacher: PreTrainedModel, history: Sequence[Cut]) -> list[tuple[int, ...]]:
    """Return for each stack which of the teacher's hidden states each block of the student should put out.

    Hidden state 0 is the embeddings, hidden state i the output of block i-1. A student block should put out what its
    next one had as input in the teacher, so that each student block does the work of the teacher's blocks from its own
    origin up to the next block kept; the last one what the teacher's last block puts out.

    Raises:
        UnsupportedModelError: teacher and student do not have the same stacks.
    """
    ours, theirs = stacks_of(student), stacks_of(teacher)
    if [stack.path for stack in ours] != [stack.path for stack in theirs]:
        raise UnsupportedModelError(
            f"hidden states need stacks of blocks at the same paths in teacher and student, got "
            f"{[stack.path for stack in theirs]} and {[stack.path for stack in ours]}; use hidden=0."
        )
    return [
        (*origins(history, stack.path, len(stack), len(original))[1:], len(original))
        for stack, original in zip(ours, theirs, strict=True)
    ]


def stacks_of(model: PreTrainedModel) -> list[Stack]:
    """Return the stacks of blocks, an encoder's before its decoder's.

    Raises:
        UnsupportedModelError: there is none.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise UnsupportedModelError(
            f"{type(model).__name__} must have repeated blocks in a ModuleList, and none were found; use student=None "
            f"and hidden=0."
        )
    return stacks
