"""The inputs of a model's layers: all in one dense pass, or one block at a time as the blocks before it change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from ..anatomy.turns import keeper_of
from ..errors import MissingInputError, UnsupportedModelError
from .listening import listen
from .replay import Batch, Forward, Replay, replaced, stopping, stopping_once
from .states import States
from .statistics import Ignored, Statistic, parts_of
from .survey import Part, prove, survey

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..anatomy.layers import WeightLayer

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """One block's turn: its statistics are complete, and its weights may now be changed.

    Attributes:
        block: the block's path; `""` for the layers that are in no block, which come last.
        index: number of the turn, from 0.
        of: how many turns there are.
        statistics: by `WeightLayer.name`, a list of one statistic; for 3-D experts, one for each expert. Where no
            token came by (an expert that none was routed to, a block that never runs) `update` was never called. They
            are dropped when the next turn is asked for.
        unseen: names of layers of this turn that are no linear modules, and whose weight no matrix product was seen to
            use (the kernel of a convolution, say): their inputs cannot be told, and no statistic was updated.
        whole_passes: whether each turn took a pass through the whole model, because the blocks do not simply follow
            one another: right, but the cost grows with the square of the depth.
        last: whether the block is complete with this turn; with `sequential` it has several.
    """

    block: str
    index: int
    of: int
    statistics: dict[str, list[Statistic]]
    unseen: tuple[str, ...] = ()
    whole_passes: bool = False
    last: bool = True


def observe(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Sequence[WeightLayer],
    statistic: Callable[[WeightLayer], Statistic],
    *,
    who: str,
    progress: bool = False,
) -> dict[str, list[Statistic]]:
    """Gather statistics of the inputs of `layers` in one dense pass of the model as it is.

    Args:
        model: the model; not changed, and its mode is put back.
        batches: from `calibration_batches`.
        layers: layers of any kind but embeddings.
        statistic: makes an empty statistic for a layer (for one expert of it, where it has several).
        who: the strategy's name, for messages.
        progress: whether to show a progress bar over the batches.

    Returns:
        By `WeightLayer.name`, a list of one statistic; for 3-D experts, one for each expert.

    Raises:
        CompressionError: an input is NaN or infinite; the message names the layer.
        UnsupportedModelError: weights are on the meta device, or a layer is an embedding.

    Example:
        >>> from llmcompress.anatomy.layers import select
        >>> from llmcompress.calibration import InputNorms
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llama")
        >>> layers, _ = select(model, who="example", targets=("*.down_proj",))
        >>> seen = observe(model, [tiny_inputs(model)], layers, InputNorms.of, who="example")
        >>> {name: one.squares.shape for name, [one] in seen.items()}["model.layers.0.mlp.down_proj"]
        torch.Size([128])
    """
    _check(model, batches, layers, who)
    forward = Forward(model, all_logits=_needs_head(model, layers))
    found = survey(forward, batches, layers, who=who)
    statistics = _empty(layers, statistic)
    # Where nothing that is asked for comes behind the last block, the head need not run.
    last = {found.order[-1].path: stopping} if found.ends and not found.doubt else {}
    with listen(layers, statistics, who=who), replaced(model, last):
        for batch in tqdm(batches, desc=who, disable=not progress):
            forward(batch)
    return statistics


def block_by_block(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Sequence[WeightLayer],
    statistic: Callable[[WeightLayer], Statistic],
    *,
    who: str,
    sequential: bool = False,
    memory_bytes: int | None = None,
    progress: bool = False,
) -> Iterator[Turn]:
    """Gather statistics one block at a time, so that each block sees what the changed blocks before it put out.

    The caller changes the weights of the block whose turn it is, and goes on: the block then runs again, and its new
    outputs are what the next block is calibrated on. Every block runs twice for each batch, whatever the depth. Before
    the first turn, one short row proves that the inputs a block gets this way equal those of a plain forward pass;
    where they do not (blocks that run twice, connections that skip blocks), each turn takes a pass through the whole
    model instead. Between turns the model is as it was: no hook, no patch, its own mode.

    Args:
        model: the model.
        batches: from `calibration_batches`.
        layers: layers of any kind but embeddings; those in no block have their turn last.
        statistic: makes an empty statistic for a layer (for one expert of it, where it has several).
        who: the strategy's name, for messages.
        sequential: whether a block has several turns, so that its later layers see what its earlier ones have
            become: q, k and v; then the layer behind the attention; then up and gate; then down. Layers that get the
            same inputs, one after the other, have one together. Each turn runs the block once more, up to its layers.
        memory_bytes: how much of the hidden states to keep in memory; the rest goes to a temporary folder (under
            `TMPDIR`), removed at the end. None is a quarter of the memory that is free.
        progress: whether to show a progress bar over the turns.

    Yields:
        A `Turn` for each block that has any of `layers`, or several.

    Raises:
        CompressionError: an input is NaN or infinite; the message names the layer. On a damaged checkpoint this comes
            before the first turn.
        UnsupportedModelError: weights are on the meta device, or a layer is an embedding.

    Example:
        >>> from llmcompress.anatomy.layers import select
        >>> from llmcompress.calibration import InputNorms
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("t5")
        >>> layers, _ = select(model, who="example", targets=None)
        >>> for turn in block_by_block(model, [tiny_inputs(model)], layers, InputNorms.of, who="example"):
        ...     print(turn.index, turn.block, len(turn.statistics))
        0 encoder.block.0 6
        1 encoder.block.1 6
        2 decoder.block.0 10
        3 decoder.block.1 10
    """
    _check(model, batches, layers, who)
    return _turns(model, batches, layers, statistic, who, sequential, memory_bytes, progress)


def _turns(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    layers: Sequence[WeightLayer],
    statistic: Callable[[WeightLayer], Statistic],
    who: str,
    sequential: bool,
    memory_bytes: int | None,
    progress: bool,
) -> Iterator[Turn]:
    forward = Forward(model, all_logits=_needs_head(model, layers))
    found = survey(forward, batches, layers, who=who)
    doubt = found.doubt or prove(forward, batches, found)
    found.inputs.clear()
    if doubt:
        _LOG.warning("%s: each block takes a pass through the whole of %s: %s", who, type(model).__name__, doubt)
    whole = {block: [Part(own, found.latest[block])] for block, own in found.turns.items()}
    turns = found.parts if sequential else whole
    total = sum(map(len, turns.values()))
    keeper = keeper_of(model)
    places = {place.path: number for number, place in enumerate(found.order)}
    with States(memory_bytes) as states, tqdm(total=total, desc=who, disable=not progress) as bar:
        replay = Replay(forward, found.order, batches, states)
        start = index = 0
        for block, parts in turns.items():
            # A block that an earlier run finished runs as it did then, so that all that comes behind gets the same.
            done = keeper.is_finished(block)
            if not done:
                keeper.begin(block)
            for number, part in enumerate([Part(found.turns[block], None)] if done else parts):
                last = done or number == len(parts) - 1
                statistics = _empty(part.layers, Ignored if done else statistic)
                # What the layer that is called last puts out is not needed yet.
                ending = {part.until: stopping_once(partial(_is_complete, statistics))} if part.until else {}
                with listen(part.layers, statistics, who=who), replaced(model, ending):
                    if doubt:
                        for batch in batches if not done else ():
                            forward(batch)
                    elif block in places:
                        # The passes of all parts but the first begin where the next block's will begin.
                        replay.run(start, places[block], again=number > 0)
                        start = places[block]
                    elif not block:
                        replay.run(start, None, again=not last)
                if not done:
                    unseen = tuple(name for name in statistics if name in found.unseen)
                    yield Turn(block, index, total, statistics, unseen, bool(doubt), last)
                    statistics.clear()
                advance = len(parts) if done else 1
                index += advance
                bar.update(advance)
            if done:
                keeper.restore(block)
            else:
                keeper.finish(block)


def _is_complete(statistics: Mapping[str, Sequence[Statistic]]) -> bool:
    """Whether all have seen equally many tokens: the layer called last may take them in several calls."""
    return len({one.count for parts in statistics.values() for one in parts}) == 1


def _empty(layers: Sequence[WeightLayer], statistic: Callable[[WeightLayer], Statistic]) -> dict[str, list[Statistic]]:
    return {layer.name: [statistic(layer) for _ in range(parts_of(layer))] for layer in layers}


def _needs_head(model: PreTrainedModel, layers: Sequence[WeightLayer]) -> bool:
    head = model.get_output_embeddings()
    return any(layer.module is head for layer in layers)


def _check(model: PreTrainedModel, batches: Sequence[Batch], layers: Sequence[WeightLayer], who: str) -> None:
    absent = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if absent is not None:
        raise UnsupportedModelError(
            f"{who} runs the model, and {absent} of {type(model).__name__} is on the meta device, without values; load "
            f"the weights with from_pretrained first (and without offloading to disk)."
        )
    embedding = next((layer.name for layer in layers if layer.kind == "embedding"), None)
    if embedding is not None:
        raise UnsupportedModelError(f"{who} cannot calibrate {embedding}: the inputs of an embedding are token ids.")
    if not batches:
        raise MissingInputError(f"{who} needs at least one calibration batch; make them with calibration_batches.")
