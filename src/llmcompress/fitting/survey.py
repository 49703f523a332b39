"""One pass over a model: what each choice does to its answers, to its bytes and to its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..anatomy.vocabulary import vocabulary_size
from ..calibration import calibration_batches
from ..compressor import Context
from ..data import Example
from ..errors import MissingInputError, NothingToCompressError
from .blocks import BlockTimer, alike, bytes_of_blocks
from .budget import Budget
from .failures import let_go, reason_of
from .made import make
from .sensitivity import Sensitivities, answers_to, vocabulary_damage
from .space import Form, Shape, Space, Vocabulary

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_SAMPLES, _LENGTH = 32, 64
# Numbers of all answers that are compared; a language model has one for each token of the vocabulary.
_MOST_NUMBERS = 2**25
# Shares of the budget that sensitivities may take, and the timings of parts of what is left behind them.
_SHARE, _TIMED_SHARE = 0.08, 0.1
# Share of the budget after which no further widths and vocabularies are looked at: each is built, which takes its time.
_LOOKING = 0.25


@dataclass(frozen=True)
class Survey:
    """What was measured, in nats, bytes and milliseconds; blocks are numbered through all stacks.

    What broke, or what there was no time for, has no numbers: a pair of shape and form may lack where both are there.

    Attributes:
        drops: of each block, what leaving it out does.
        together: for each number of blocks left out, what that does beyond the sum; index 0 is none.
        widths: for each shape that runs, and each block.
        rounding: for each form that runs, and each block.
        rest_rounding: for each of these forms, of all that is in no block.
        vocabulary: for each vocabulary that can be compared.
        block_bytes: for each shape, form and block.
        block_ms: the same.
        rest_bytes: for each vocabulary and form.
        rest_ms: for each form.
        skipped: what there was no time to look at.
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
    skipped: list[Shape | Vocabulary] = field(default_factory=list)


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
        space: what can be chosen; what breaks on the way, cannot be compared, or finds no time, has no numbers then,
            and is told in its notes.
        context: its data, tokenizer and seed are used.
        unseen: texts that are none of the data, for the vocabularies.
        shape: rows and tokens at which blocks are timed.
        budget: decides on how many texts sensitivities are measured, how long each part is timed, and how many widths
            and vocabularies are looked at.
    """
    surveyor = _Surveyor(model, space, context, shape, budget)
    surveyor.depths()
    own, *narrower = space.shapes
    surveyor.width(own)
    for form in space.forms:
        surveyor.form(form)
    surveyor.vocabularies(unseen)
    for number, narrow in enumerate(narrower):
        if budget.spent() > surveyor.until:
            surveyor.hurried(*narrower[number:])
            break
        surveyor.width(narrow)
    return surveyor.found


class _Surveyor:
    """Fills a survey, part by part; the model's own width comes before the forms, whose times are told by it."""

    def __init__(
        self, model: PreTrainedModel, space: Space, context: Context, shape: tuple[int, int], budget: Budget
    ) -> None:
        self._model, self._space, self._context, self._shape, self._budget = model, space, context, shape, budget
        self.until = budget.spent() + _LOOKING * budget.seconds
        self.found = Survey([], [], {}, {}, {}, {}, {}, {}, {}, {})
        self._parts = alike(model, space.blocks)
        self._damages = Sensitivities(model, self._texts(), space.blocks)
        timings = len(space.forms) * (len(space.shapes) * len(set(self._parts)) + 1)
        self._seconds = max(_TIMED_SHARE * budget.left() / timings, 0.0)
        self._timer = self._timer_of(model)

    def depths(self) -> None:
        """Leave out each block; then the most harmless one, the two most harmless and so on, as far as they may go."""
        drops, together = self.found.drops, self.found.together
        drops += [self._damages.without([number]) for number in range(len(self._space.blocks))]
        stays = set(self._space.fixed)
        for own in self._space.stack_blocks:
            if not stays & set(own):
                stays.add(max(own, key=drops.__getitem__))
        gone: list[int] = []
        together.append(0.0)
        for number in sorted(set(range(len(drops))) - stays, key=drops.__getitem__):
            gone.append(number)
            together.append(max(self._damages.without(gone) - sum(drops[one] for one in gone), 0.0))

    def width(self, own: Shape) -> None:
        """Cut to these widths: what it does to each block, and what each then costs in each form."""
        narrow = own.step()
        blocks = self._space.blocks
        try:
            cut = self._model if narrow is None else make(self._model, [narrow], self._context).model
            moved = [0.0] * len(blocks) if narrow is None else self._damages.with_blocks(cut)
            timer = self._timer if narrow is None else self._timer_of(cut)
            self._costs(cut, own, self._space.forms[0], timer)
        except Exception as error:  # no plan runs a model: parts of it may need the old widths
            if narrow is None:
                raise
            self._left_out(f"{narrow} is left out", error)
            return
        self.found.widths[own] = moved
        for form in self._space.forms[1:]:
            try:
                self._costs(cut, own, form, timer)
            except Exception as error:
                self._left_out(f"no {form}" if narrow is None else f"no {form} behind {narrow}", error)

    def form(self, form: Form) -> None:
        """Store all of the model so: what that does to each block and to the rest, and how long the rest takes."""
        found, blocks, own = self.found, self._space.blocks, self._space.shapes[0]
        if (own, form) not in found.block_ms:
            return  # it is told already
        step = form.of_all(self._space.rest, self._space.unpacked)
        try:
            whole = self._model if step is None else make(self._model, [step], self._context).model
            rounding = [0.0] * len(blocks) if step is None else self._damages.with_blocks(whole)
            rest_rounding = 0.0 if step is None else self._damages.rest_of(whole)
            whole_ms = self._timer.whole(whole)
        except Exception as error:
            if step is None:
                raise
            self._left_out(f"no {form}", error)
            return
        found.rounding[form], found.rest_rounding[form] = rounding, rest_rounding
        found.rest_ms[form] = max(whole_ms - sum(found.block_ms[own, form]), 0.0)

    def vocabularies(self, unseen: Sequence[Example]) -> None:
        """Cut to each vocabulary: what that does to texts that it was not cut for, and what the rest then takes."""
        context, space, model = self._context, self._space, self._model
        assert context.tokenizer is not None
        own, *cuts = space.vocabularies
        self.found.vocabulary[own] = 0.0
        models = {own: model}
        if cuts and not unseen:
            space.notes.append("the vocabulary stays: the task has no texts to try a smaller one on")
            cuts = []
        texts = unseen[:_SAMPLES]
        base = answers_to(model, context.tokenizer, texts, max_length=_LENGTH) if cuts else []
        for number, vocabulary in enumerate(cuts):
            if len(models) > 1 and self._budget.spent() > self.until:
                self.hurried(*cuts[number:])
                break
            step = vocabulary.step()
            assert step is not None
            try:
                made = make(model, [step], context)
                damage = vocabulary_damage(base, answers_to(made.model, made.tokenizer, texts, max_length=_LENGTH))
            except Exception as error:
                self._left_out(f"{step} is left out", error)
                continue
            if damage is None:
                space.notes.append(f"{step} is left out: the model answers token by token, and texts get other tokens")
                continue
            self.found.vocabulary[vocabulary] = damage
            models[vocabulary] = made.model
        for form in list(self.found.rest_ms):
            try:
                sizes = self._rest_bytes(models, form)
            except Exception as error:
                if form == space.forms[0]:
                    raise
                del self.found.rest_ms[form]
                self._left_out(f"no {form}", error)
                continue
            self.found.rest_bytes.update({(vocabulary, form): size for vocabulary, size in sizes.items()})

    def hurried(self, *left: Shape | Vocabulary) -> None:
        """Tell what there is no time to look at."""
        self.found.skipped.extend(left)
        steps = ", ".join(str(one.step()) for one in left)
        self._space.notes.append(f"{steps} left out: no time to look at more in this budget")

    def _texts(self) -> list[dict[str, torch.Tensor]]:
        """Return as many texts as there is time for, passes through the model taking what a first one takes."""
        model, context, space, budget = self._model, self._context, self._space, self._budget
        few = texts_of(model, context, 4)
        begin = budget.spent()
        Sensitivities(model, few, space.blocks).without([0])
        pass_seconds = max(budget.spent() - begin, 1e-3) / 2 / max(sum(len(b["input_ids"]) for b in few), 1)
        passes = len(space.blocks) * (len(space.shapes) + len(space.forms) + 2)
        samples = int(_SHARE * budget.seconds / (pass_seconds * passes))
        return texts_of(model, context, min(max(samples, 4), _SAMPLES))

    def _timer_of(self, model: PreTrainedModel) -> BlockTimer:
        """Return what times blocks as wide as those of `model`."""
        paths = [self._space.blocks[number] for number in sorted(set(self._parts))]
        return BlockTimer(model, paths, self._shape, self._seconds)

    def _costs(self, cut: PreTrainedModel, own: Shape, form: Form, timer: BlockTimer) -> None:
        blocks, parts = self._space.blocks, self._parts
        step = form.of_blocks([blocks[number] for number in sorted(set(parts))], self._space.unpacked)
        stored = cut if step is None else make(cut, [step], self._context).model
        sizes, _ = bytes_of_blocks(stored, blocks)
        times = {number: timer.block(stored, blocks[number]) for number in set(parts)}
        self.found.block_bytes[own, form] = [sizes[part] for part in parts]
        self.found.block_ms[own, form] = [times[part] for part in parts]

    def _rest_bytes(self, models: Mapping[Vocabulary, PreTrainedModel], form: Form) -> dict[Vocabulary, float]:
        """Return the bytes outside of the blocks with each vocabulary: of the two smallest tell what a row takes."""
        space = self._space
        rows = {own: vocabulary_size(model) for own, model in models.items()}
        stored: dict[Vocabulary, float] = {}
        for own in sorted(models, key=rows.__getitem__):
            first, last = (
                (min(stored, key=rows.__getitem__), max(stored, key=rows.__getitem__)) if stored else (own, own)
            )
            if rows[last] > rows[first]:
                row = (stored[last] - stored[first]) / (rows[last] - rows[first])
                stored[own] = stored[first] + row * (rows[own] - rows[first])
                continue
            step = form.of_rest(space.blocks, space.rest)
            try:
                changed = models[own] if step is None else make(models[own], [step], self._context).model
            except NothingToCompressError:
                changed = models[own]  # whose embeddings stay as they are: Gemma's have a forward of their own
            stored[own] = bytes_of_blocks(changed, space.blocks)[1]
        return stored

    def _left_out(self, what: str, error: Exception) -> None:
        let_go(error)
        self._space.notes.append(f"{what}: {reason_of(error)}")


def texts_of(
    model: PreTrainedModel, context: Context, samples: int, length: int = _LENGTH
) -> list[dict[str, torch.Tensor]]:
    """Return batches of so many texts of the data, each cut to `length` tokens.

    They are fewer where a language model has many answers to each, and more where they are short.

    Raises:
        MissingInputError: all of them are too short.
    """
    head = model.get_output_embeddings()
    if head is not None:
        samples = max(min(samples, _MOST_NUMBERS // (length * model.config.get_text_config().vocab_size)), 1)
    while True:
        try:
            return calibration_batches(model, context, who="fit", samples=samples, max_length=length)
        except MissingInputError:
            # A few short texts hold too few tokens; it takes more of them.
            if samples >= min(_SAMPLES, len(context.data or ())):
                raise
            samples *= 2
