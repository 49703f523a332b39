"""Which teacher block each student block answers for: told by what was cut, spread evenly, the last, or named."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BeforeValidator

from ..anatomy.depth import origins
from ..compressor import Cut
from ..errors import ConfigError, UnsupportedModelError
from .student import stacks_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Pairs: TypeAlias = tuple[tuple[int, int], ...]
"""(student block, teacher block), both counted from 0."""

Layers: TypeAlias = Literal["auto", "uniform", "last"] | tuple[int, ...] | Pairs
_FORMS = (
    "'auto', 'uniform', 'last', one teacher block for each student block such as (1, 3, 5), or pairs (student block, "
    "teacher block) such as ((0, 1), (2, 5))"
)


def read_layers(given: Any) -> Any:
    """Return what `KnowledgeDistillation.layers` holds, lists as tuples.

    Raises:
        ConfigError: it is of no known form.

    Example:
        >>> read_layers("last"), read_layers([1, 3, 5]), read_layers([[0, 1], [2, 5]])
        ('last', (1, 3, 5), ((0, 1), (2, 5)))
    """
    if isinstance(given, str) and given in ("auto", "uniform", "last"):
        return given
    if isinstance(given, (list, tuple)) and given:
        if all(_is_block(entry) for entry in given):
            return tuple(given)
        if all(isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_block, pair)) for pair in given):
            if len({mine for mine, _ in given}) < len(given):
                raise ConfigError(f"KnowledgeDistillation.layers must name each student block once, got {given!r}.")
            return tuple((mine, theirs) for mine, theirs in given)
    raise ConfigError(f"KnowledgeDistillation.layers must be {_FORMS}, got {given!r}.")


def _is_block(number: Any) -> bool:
    return type(number) is int and number >= 0


def layer_map(
    layers: Layers,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    history: Sequence[Cut],
    *,
    planned: Sequence[Cut] = (),
) -> list[Pairs]:
    """Return for each stack of blocks which student block is compared with which teacher block.

    Args:
        layers: `"auto"`: a student block does the work of the teacher's blocks from its own origin up to the next one
            kept, the last one up to the teacher's last; so it is compared with the block before the next one's origin.
            What earlier steps did not leave (a student from elsewhere) is taken as evenly spread. `"uniform"`: evenly
            spread whatever was kept (TinyBERT, arXiv 1909.10351). `"last"`: the last with the last (MiniLM, arXiv
            2002.10957). Or blocks by number, in every stack of an encoder-decoder.
        student: the student.
        teacher: the teacher.
        history: what earlier steps cut.
        planned: blocks that the student is about to lose.

    Raises:
        ConfigError: `layers` names a block that is not there.
        UnsupportedModelError: teacher and student do not have equally many stacks.
    """
    ours, theirs = stacks_of(student), stacks_of(teacher)
    if len(ours) != len(theirs):
        raise UnsupportedModelError(
            f"features need equally many stacks of blocks in teacher and student, got "
            f"{[stack.path for stack in theirs]} and {[stack.path for stack in ours]}; use features={{}}."
        )
    coming = {cut.path: len(cut.kept) for cut in planned}
    pairs = []
    for stack, original in zip(ours, theirs, strict=True):
        few, many = coming.get(stack.path, len(stack)), len(original)
        if layers == "auto":
            ends = (*origins([*history, *planned], stack.path, few, many)[1:], many)
            pairs.append(tuple((block, end - 1) for block, end in enumerate(ends)))
        elif layers == "uniform":
            pairs.append(tuple((block, -(-(block + 1) * many // few) - 1) for block in range(few)))
        elif layers == "last":
            pairs.append(((few - 1, many - 1),))
        else:
            pairs.append(_named(layers, stack.path, few, many))
    return pairs


def _named(layers: tuple[Any, ...], path: str, few: int, many: int) -> Pairs:
    pairs: Pairs = layers if isinstance(layers[0], tuple) else tuple(enumerate(layers))
    if not isinstance(layers[0], tuple) and len(layers) != few:
        raise ConfigError(
            f"KnowledgeDistillation.layers must name a teacher block for each of the student's {few} blocks in {path}, "
            f"got {layers!r}; name pairs to compare some of them only."
        )
    for ours, theirs in pairs:
        if ours >= few or theirs >= many:
            raise ConfigError(
                f"KnowledgeDistillation.layers must name blocks that are there, got {(ours, theirs)}; {path} has {few} "
                f"blocks (0 to {few - 1}) in the student and {many} (0 to {many - 1}) in the teacher."
            )
    return pairs


LayersField = Annotated[Layers, BeforeValidator(read_layers)]
