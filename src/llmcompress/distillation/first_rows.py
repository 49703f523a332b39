"""What the first rows show: do both models put out what is compared, and where do learned projections start?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..anatomy.kept import modes_kept
from .checks import refuse_unequal_maps
from .heads import Batch, model_inputs
from .objective import Objective
from .observation import Observed, Observer, Teacher
from .projections import LeastSquares, Place


def fitted_projections(
    student: Observer, teacher: Teacher, objective: Objective, batches: Iterable[Batch]
) -> dict[Place, nn.Linear]:
    """Return a projection for each hidden state that is compared with one of another width, fitted to `batches`.

    Args:
        student: of the model that is about to be trained.
        teacher: answers to a batch.
        objective: tells what is compared.
        batches: some rows; from `collate`. No more than the first one is looked at where no projection is needed.

    Raises:
        UnsupportedModelError: the models do not put out what is compared, or attention maps of as many heads.
    """
    seen: dict[Place, LeastSquares] = {}
    for batch in batches if objective.reads else ():
        mine, theirs = _both(student, teacher, batch)
        _check_heads(mine, theirs, objective)
        masks = objective.token_masks({name: value.to(student.model.device) for name, value in batch.items()})
        for stack, own, other in _states(objective):
            state, target = mine.states[stack][own], objective.alignment.state(theirs.states[stack][other])
            if state.shape[-1] != target.shape[-1]:
                mask = masks[stack]
                seen.setdefault((stack, own), LeastSquares()).add(state[mask], target.to(state.device)[mask])
        if not seen:
            break
    return {place: squares.layer() for place, squares in seen.items()}


def _states(objective: Objective) -> Iterator[tuple[int, int, int]]:
    """Yield stack, and the numbers of the student's and the teacher's hidden state, of all that are compared."""
    for stack in range(len(objective.alignment.pairs)) if "embeddings" in objective.reads else ():
        yield stack, 0, 0
    for stack, own, other in _pairs(objective) if "states" in objective.reads else ():
        yield stack, own + 1, other + 1


@torch.no_grad()
def _both(student: Observer, teacher: Teacher, batch: Batch) -> tuple[Observed, Observed]:
    inputs = model_inputs(batch)
    with modes_kept(student.model):
        student.model.eval()
        mine = student({name: value.to(student.model.device) for name, value in inputs.items()})
    return mine, teacher(batch)


def _check_heads(mine: Observed, theirs: Observed, objective: Objective) -> None:
    for stack, own, other in _pairs(objective) if "attention" in objective.reads else ():
        maps = objective.alignment.attention(theirs.attention[stack][other], stack, other)
        refuse_unequal_maps(own, other, mine.attention[stack][own].shape[1], maps.shape[1])


def _pairs(objective: Objective) -> Iterator[tuple[int, int, int]]:
    for stack, pairs in enumerate(objective.alignment.pairs):
        for own, other in pairs:
            yield stack, own, other
