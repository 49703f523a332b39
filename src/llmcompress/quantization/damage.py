"""How far a model's answers move when one layer alone is rounded: measured, or estimated from gradients.

Measured: each layer at each width is put in the model, which runs on from the layer's block. Estimated: to second
order, KL = 1/2 e^T F e for the error e of the weights and the Fisher information F of the model's own distribution. Of
F the diagonal is taken: errors of rounding are as good as independent of each other, so the rest averages out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from ..anatomy.layers import WeightLayer
from ..calibration.answers import answers_of, divergence, log_distributions
from ..calibration.differentiation import differentiable
from ..calibration.replay import Batch, Forward, Replay
from ..calibration.states import States
from ..calibration.survey import prove, survey
from ..errors import CompressionError
from .fitting import Fit, quantize
from .grid import Grid, decode
from .upright import as_stored, upright

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Numbers of the base's distributions that are kept (256 MiB in float32); beyond that, answers are left out evenly.
_MOST_NUMBERS = 2**26


@dataclass(frozen=True)
class Candidate:
    """A weight that may be rounded, with a grid for each number of bits.

    Attributes:
        layer: a layer that has the weight.
        grids: bits -> grid.
        alone: whether no other layer shares the weight.
    """

    layer: WeightLayer
    grids: Mapping[int, Grid]
    alone: bool = True

    def rounded(self, bits: int, fit: Fit) -> torch.Tensor:
        """Return the weight rounded to `bits`, as the layer stores it."""
        grid = self.grids[bits]
        return as_stored(self.layer, decode(quantize(upright(self.layer), grid, fit), grid))


Damages = dict[tuple[str, int], float]
"""(layer name, bits) -> nats an answer."""


def measured(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate],
    fit: Fit,
    *,
    who: str,
    progress: bool = False,
) -> tuple[Damages, int]:
    """Return the mean KL(base || model with one layer rounded) for each candidate and width, and the answers counted.

    Each weight is put back afterwards, also where the work is broken off.

    Args:
        model: the float model.
        batches: from `calibration_batches`.
        candidates: what to round.
        fit: how grids are laid.
        who: for messages and the progress bar.
        progress: whether to show one.
    """
    watch = _Answers(model, batches, who)
    order, turns = _turns(watch, batches, candidates, who)
    found: Damages = {}
    count = sum(len(candidate.grids) for candidate in candidates)
    with States(None) as states, tqdm(total=count, desc=who, disable=not progress) as bar:
        replay = Replay(watch, order, batches, states)
        for batch in batches:
            watch(batch)
        at = 0
        for block, own in turns:
            # The pass that brings the outputs of the block before; it ends behind this one.
            if block > at:
                replay.run(at, block)
                at = block
            for candidate in own:
                for bits in candidate.grids:
                    with _instead(candidate.layer.weight, candidate.rounded(bits, fit)):
                        watch.begin()
                        replay.run(block, None)
                    found[candidate.layer.name, bits] = watch.mean()
                    bar.update()
    return found, watch.count


def estimated(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    candidates: Sequence[Candidate],
    fit: Fit,
    *,
    who: str,
    seed: int = 0,
    progress: bool = False,
) -> tuple[Damages, int]:
    """Return what `measured` does to second order, at the price of one backward pass for each text.

    Needs memory for two more copies of the candidates' weights in float32.

    Args:
        model: the float model.
        batches: from `calibration_batches`.
        candidates: what to round.
        fit: how grids are laid.
        who: for messages and the progress bar.
        seed: of the answers that are drawn from the model's own distributions.
        progress: whether to show a progress bar.
    """
    weights = [candidate.layer.weight for candidate in candidates]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    rows = [{key: tensor[row : row + 1] for key, tensor in batch.items()} for batch in batches for row in _rows(batch)]
    generator = torch.Generator().manual_seed(seed)
    options = Forward(model, all_logits=True).options
    answers = 0
    with differentiable(model, weights), torch.enable_grad():
        for row in tqdm(rows, desc=who, disable=not progress):
            logits = answers_of(model, model(**row, **options))
            _refuse_nan(model, log_distributions(logits.detach()), who)
            answers += len(logits)
            slopes = torch.autograd.grad(_drawn_loss(logits, generator), weights, allow_unused=True)
            for square, slope in zip(squares, slopes, strict=True):
                if slope is not None:
                    square += slope.float().square()
    found: Damages = {}
    for candidate, square in zip(candidates, squares, strict=True):
        for bits in candidate.grids:
            error = candidate.rounded(bits, fit).float() - candidate.layer.weight.detach().float()
            found[candidate.layer.name, bits] = float((error.square_() * square).sum() / (2 * answers))
    return found, answers


class _Answers(Forward):
    """Passes whose answers are kept the first time, and compared with what was kept each other time."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], who: str) -> None:
        super().__init__(model, all_logits=True)
        self._who = who
        self._tokens = [batch["input_ids"].numel() for batch in batches]
        self._base: list[torch.Tensor] = []
        self._step = 0
        self._kl: list[torch.Tensor] | None = None
        self.silent = False

    @property
    def count(self) -> int:
        """Answers that are compared."""
        return sum(map(len, self._base))

    def begin(self) -> None:
        """Compare the next passes, one for each batch, with what was kept."""
        self._kl = []

    def mean(self) -> float:
        """Return the mean KL since `begin`."""
        assert self._kl is not None
        assert len(self._kl) == len(self._base)
        found = torch.cat(self._kl).double().mean()
        self._kl = None
        return float(found)

    def __call__(self, batch: Batch) -> Any:
        outputs = super().__call__(batch)
        if outputs is None or self.silent:
            return outputs
        logits = answers_of(self.model, outputs)
        if not self._step:
            total = logits.numel() * sum(self._tokens) // self._tokens[0]
            self._step = -(-total // _MOST_NUMBERS)
        logs = log_distributions(logits[:: self._step])
        if self._kl is None:
            _refuse_nan(self.model, logs, self._who)
            self._base.append(logs)
        else:
            found = divergence(self._base[len(self._kl)], logs)
            # A NaN counts as nothing in a divergence, and must not pass for a harmless layer.
            self._kl.append(torch.full_like(found, torch.nan) if logs.isnan().any() else found)
        return outputs


def _turns(
    watch: _Answers, batches: Sequence[Batch], candidates: Sequence[Candidate], who: str
) -> tuple[list[Any], list[tuple[int, list[Candidate]]]]:
    """Return the blocks in their order, and which candidates can begin at which of them; 0 is the whole model."""
    watch.silent = True
    own = [one.layer for one in candidates if one.alone and one.layer.kind != "embedding"]
    found = survey(watch, batches, own, who=who)
    doubt = found.doubt or not own or prove(watch, batches, found)
    watch.silent = False
    if doubt:
        return [], [(0, list(candidates))]
    places = {place.path: number for number, place in enumerate(found.order)}
    begin = {layer.name: places.get(block, 0) for block, layers in found.turns.items() for layer in layers}
    turns: dict[int, list[Candidate]] = {}
    for candidate in candidates:
        turns.setdefault(begin.get(candidate.layer.name, 0), []).append(candidate)
    return found.order, sorted(turns.items())


@contextmanager
def _instead(weight: torch.Tensor, other: torch.Tensor) -> Iterator[None]:
    before = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(other)
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _refuse_nan(model: PreTrainedModel, answers: torch.Tensor, who: str) -> None:
    if answers.isnan().any():
        raise CompressionError(
            f"{who}: the answers of {type(model).__name__} must be numbers before anything is rounded, and are NaN or "
            f"infinite; repair the checkpoint, or load it in float32."
        )


def _rows(batch: Batch) -> range:
    return range(len(batch["input_ids"]))


def _drawn_loss(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return minus the log-likelihood of answers drawn from the model's own distributions, summed up."""
    if logits.shape[-1] == 1:
        noise = torch.randn(logits.shape, dtype=torch.float32, generator=generator).to(logits.device)
        return (noise * logits).sum()
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
