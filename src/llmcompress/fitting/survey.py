"""One pass over a model: what each choice does to its answers, to its bytes and to its time."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..anatomy.vocabulary import vocabulary_size
from ..calibration import calibration_batches
from ..compressor import Compressor, Context
from ..data import Example
from ..errors import CompressionError, MissingInputError, NothingToCompressError
from ..measured import seeded
from .blocks import BlockTimer, bytes_of_blocks
from .budget import Budget
from .sensitivity import Sensitivities, vocabulary_damage
from .space import Form, Shape, Space, Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_SAMPLES, _LENGTH = 32, 64
# Numbers of all answers that are compared; a language model has one for each token of the vocabulary.
_MOST_NUMBERS = 2**25
# Shares of the budget that sensitivities may take, and the timings of parts of what is left behind them.
_SHARE, _TIMED_SHARE = 0.08, 0.1


@dataclass(frozen=True)
class Survey:
    """What was measured, in nats, bytes and milliseconds; blocks are numbered through all stacks.

    Attributes:
        drops: of each block, what leaving it out does.
        together: for each number of blocks left out, what that does beyond the sum; index 0 is none.
        widths: for each shape that runs, and each block.
        rounding: for each form and block.
        rest_rounding: for each form, of all that is in no block.
        vocabulary: for each vocabulary.
        block_bytes: for each shape that runs, form and block.
        block_ms: the same.
        rest_bytes: for each vocabulary and form.
        rest_ms: for each form.
    """

    drops: list[float]
    together: list[float]
    widths: dict[Shape, list[float]]
    rounding: dict[Form, list[float]]
    rest_rounding: dict[Form, float]
    vocabulary: dict[Vocabulary, float]
    block_bytes: dict[tuple[Shape, Form], list[float]]
    block_ms: dict[tuple[Shape, Form], list[float]]
    rest_bytes: dict[tuple[Vocabulary, Form], float]
    rest_ms: dict[Form, float]


def survey(
    model: PreTrainedModel,
    space: Space,
    context: Context,
    unseen: Sequence[Example],
    shape: tuple[int, int],
    budget: Budget,
) -> Survey:
    """Measure every choice of `space` on `model`, which is left as it was.

    Args:
        model: the base.
        space: what can be chosen; widths that do not run, and vocabularies that cannot be compared, have no numbers
            then, and are told in its notes.
        context: its data, tokenizer and seed are used.
        unseen: texts that are none of the data, for the vocabularies.
        shape: rows and tokens at which blocks are timed.
        budget: decides on how many texts sensitivities are measured, and how long each part is timed.
    """
    blocks = space.blocks
    few = _batches(model, context, 4)
    begin = budget.spent()
    Sensitivities(model, few, blocks).without([0])
    pass_seconds = max(budget.spent() - begin, 1e-3) / 2 / max(sum(len(b["input_ids"]) for b in few), 1)
    passes = len(blocks) * (len(space.shapes) + len(space.forms) + 2)
    samples = int(_SHARE * budget.seconds / (pass_seconds * passes))
    batches = _batches(model, context, min(max(samples, 4), _SAMPLES))
    damages = Sensitivities(model, batches, blocks)
    drops = [damages.without([number]) for number in range(len(blocks))]
    parts = _alike(model, space)
    timings = len(space.forms) * (len(space.shapes) * len(set(parts)) + 1)
    seconds = max(_TIMED_SHARE * budget.left() / timings, 0.0)
    timer = BlockTimer(model, [blocks[number] for number in sorted(set(parts))], shape, seconds)

    widths: dict[Shape, list[float]] = {}
    block_bytes: dict[tuple[Shape, Form], list[float]] = {}
    block_ms: dict[tuple[Shape, Form], list[float]] = {}
    for own in space.shapes:
        narrow = own.step()
        try:
            cut = model if narrow is None else make(model, [narrow], context).model
            moved = [0.0 if narrow is None else damages.with_block(cut, number) for number in range(len(blocks))]
        except (CompressionError, RuntimeError) as error:
            if narrow is None:
                raise
            # No plan runs a model: parts of it may need the number of heads, and T5's first block hands the others a
            # bias of one row a head.
            why, _, _ = str(error).partition("\n")
            space.notes.append(f"{narrow} is left out: {why}")
            continue
        widths[own] = moved
        for form in space.forms:
            stored = _stored(cut, form, [blocks[number] for number in sorted(set(parts))], context)
            sizes, _ = bytes_of_blocks(stored, blocks)
            times = {number: timer.block(stored, blocks[number]) for number in set(parts)}
            block_bytes[own, form] = [sizes[part] for part in parts]
            block_ms[own, form] = [times[part] for part in parts]

    rounding: dict[Form, list[float]] = {}
    rest_rounding, rest_ms = {}, {}
    for form in space.forms:
        step = form.of_all(space.rest)
        whole = model if step is None else make(model, [step], context).model
        rounding[form] = [0.0 if step is None else damages.with_block(whole, number) for number in range(len(blocks))]
        rest_rounding[form] = 0.0 if step is None else damages.rest_of(whole)
        rest_ms[form] = max(timer.whole(whole) - sum(block_ms[space.shapes[0], form]), 0.0)
    return Survey(
        drops,
        _together(damages, drops, space),
        widths,
        rounding,
        rest_rounding,
        block_bytes=block_bytes,
        block_ms=block_ms,
        rest_ms=rest_ms,
        **_vocabularies(model, space, context, unseen),
    )


@dataclass(frozen=True)
class Made:
    """A changed model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def make(model: PreTrainedModel, steps: Iterable[Compressor], context: Context) -> Made:
    """Do `steps` to a copy of `model` as `lc.compress` does, with nothing measured and nothing told."""
    own = replace(context, history=[], told=[], corrected=set())
    changed = copy.deepcopy(model)
    for step in steps:
        with seeded(context.seed):
            changed = step.compress(changed.eval(), own)
    assert own.tokenizer is not None
    return Made(changed.eval(), own.tokenizer)


def _batches(model: PreTrainedModel, context: Context, samples: int) -> list[dict[str, torch.Tensor]]:
    head = model.get_output_embeddings()
    if head is not None:
        samples = max(min(samples, _MOST_NUMBERS // (_LENGTH * model.config.get_text_config().vocab_size)), 1)
    while True:
        try:
            return calibration_batches(model, context, who="fit", samples=samples, max_length=_LENGTH)
        except MissingInputError:
            # A few short texts hold too few tokens; it takes more of them.
            if samples >= min(_SAMPLES, len(context.data or ())):
                raise
            samples *= 2


def _alike(model: PreTrainedModel, space: Space) -> list[int]:
    """Return for each block the number of the first one with the same tensors: those cost the same."""
    first: dict[object, int] = {}
    found = []
    for number, path in enumerate(space.blocks):
        tensors = tuple((name, tuple(tensor.shape)) for name, tensor in model.get_submodule(path).state_dict().items())
        found.append(first.setdefault((path.rpartition(".")[0], tensors), number))
    return found


def _stored(model: PreTrainedModel, form: Form, paths: Sequence[str], context: Context) -> PreTrainedModel:
    step = form.of_blocks(paths)
    return model if step is None else make(model, [step], context).model


def _together(damages: Sensitivities, drops: Sequence[float], space: Space) -> list[float]:
    """Leave out the most harmless block, the two most harmless and so on, one of each stack staying."""
    order = sorted(range(len(drops)), key=drops.__getitem__)
    last = {max(own, key=drops.__getitem__) for own in space.stack_blocks}
    gone: list[int] = []
    found = [0.0]
    for number in order:
        if number not in last:
            gone.append(number)
            found.append(max(damages.without(gone) - sum(drops[one] for one in gone), 0.0))
    return found


def _vocabularies(model: PreTrainedModel, space: Space, context: Context, unseen: Sequence[Example]) -> dict[str, dict]:
    damages: dict[Vocabulary, float] = {}
    models: dict[Vocabulary, PreTrainedModel] = {}
    assert context.tokenizer is not None
    for vocabulary in space.vocabularies:
        step = vocabulary.step()
        cut, damage = model, 0.0
        if step is not None:
            try:
                made = make(model, [step], context)
                cut = made.model
                found = vocabulary_damage(
                    model, context.tokenizer, cut, made.tokenizer, unseen[:_SAMPLES], max_length=_LENGTH
                )
            except CompressionError as error:
                space.notes.append(f"{step} is left out: {error}")
                continue
            if found is None:
                space.notes.append(f"{step} is left out: the model answers token by token, and texts get other tokens")
                continue
            damage = found
        damages[vocabulary] = damage
        models[vocabulary] = cut
    sizes = {
        (own, form): size for form in space.forms for own, size in _rest_bytes(models, form, space, context).items()
    }
    return {"vocabulary": damages, "rest_bytes": sizes}


def _rest_bytes(
    models: Mapping[Vocabulary, PreTrainedModel], form: Form, space: Space, context: Context
) -> dict[Vocabulary, float]:
    """Return the bytes outside of the blocks with each vocabulary: of the two smallest tell what a row takes."""
    rows = {own: vocabulary_size(model) for own, model in models.items()}
    stored: dict[Vocabulary, float] = {}
    for own in sorted(models, key=rows.__getitem__):
        first, last = (min(stored, key=rows.__getitem__), max(stored, key=rows.__getitem__)) if stored else (own, own)
        if rows[last] > rows[first]:
            row = (stored[last] - stored[first]) / (rows[last] - rows[first])
            stored[own] = stored[first] + row * (rows[own] - rows[first])
            continue
        step = form.of_rest(space.blocks, space.rest)
        try:
            changed = models[own] if step is None else make(models[own], [step], context).model
        except NothingToCompressError:
            changed = models[own]  # whose embeddings stay as they are: Gemma's have a forward of their own
        stored[own] = bytes_of_blocks(changed, space.blocks)[1]
    return stored
