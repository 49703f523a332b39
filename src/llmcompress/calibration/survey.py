"""One short row through the model: in which order the blocks run, and whether they can be run one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.stacks import find_stacks
from ..anatomy.turns import block_of
from .listening import is_watched, listen
from .replay import Batch, Forward, Place, Replay, replaced, tensors_of
from .states import States
from .statistics import parts_of

if TYPE_CHECKING:
    from ..anatomy.layers import WeightLayer

_SHORT = 16


@dataclass(frozen=True)
class Part:
    """Layers of a block that get equal inputs, one after the other (q, k and v).

    Attributes:
        layers: the layers.
        until: path of a layer; when it is called all of them have got their inputs. None where there is no such one.
    """

    layers: list[WeightLayer]
    until: str | None


@dataclass(frozen=True)
class Survey:
    """What one plain forward pass of a short row has shown.

    Attributes:
        order: the blocks that ran, in the order of their first run.
        inputs: the tensors that each of them got, in that order.
        turns: the layers that are asked for by the path of their block, in the order of the run; blocks that did not
            run come behind, and under `""` what is in no block comes last.
        doubt: why the blocks cannot be run one at a time, or None.
        parts: the same layers in the order of the run, with those of a block divided: what the layers of a part put out
            decides the inputs of the parts behind it.
        latest: by the same paths, which of the turn's layers is called last, if each is called once; else None.
        ends: whether no layer is used behind the last block.
        unseen: names of layers that are no linear modules, and whose weight no matrix product was seen to use.
    """

    order: list[Place]
    inputs: list[list[torch.Tensor]]
    turns: dict[str, list[WeightLayer]]
    parts: dict[str, list[Part]]
    latest: dict[str, str | None]
    doubt: str | None
    ends: bool
    unseen: tuple[str, ...]


class _Stages:
    """Counts the stages of a pass: one begins where a layer gets other inputs than the layer before it."""

    def __init__(self) -> None:
        self._calls, self._number = 0, -1
        self._latest: torch.Tensor | None = None

    def place(self, inputs: torch.Tensor) -> tuple[int, int]:
        """Return the number of the stage of a layer that gets `inputs`, and which call this is."""
        if self._latest is None or not torch.equal(self._latest, inputs):
            self._number += 1
            self._latest = inputs.clone()
        self._calls += 1
        return self._number, self._calls


class _Witness:
    """Notes during which block a layer got inputs, and how many blocks had begun by then; and in which stages."""

    def __init__(self, calls: list[str], running: list[str], stages: _Stages) -> None:
        self._calls, self._running, self._stages = calls, running, stages
        self.count = 0
        self.seen: set[tuple[str, int]] = set()
        self.places: list[tuple[int, int]] = []

    def update(self, inputs: torch.Tensor) -> None:
        """Note where the model is."""
        self.count += len(inputs)
        self.seen.add((self._running[-1], len(self._calls)))
        self.places.append(self._stages.place(inputs))


def survey(forward: Forward, batches: Sequence[Batch], layers: Sequence[WeightLayer], *, who: str) -> Survey:
    """Run one short row of `batches`, and see which blocks run, in which order, and where the layers are used.

    Raises:
        CompressionError: an input of a layer is NaN or infinite.
    """
    stacks = find_stacks(forward.model)
    stack_of = {stack.block_path(index): stack.path for stack in stacks for index in range(len(stack))}
    calls: list[str] = []
    inputs: list[list[torch.Tensor]] = []
    running = [""]

    def record(path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def block(*args: Any, **kwargs: Any) -> Any:
            calls.append(path)
            inputs.append(_copies(tensors_of((args, kwargs))))
            running.append(path)
            try:
                return own(*args, **kwargs)
            finally:
                running.pop()

        return block

    counter = _Stages()
    witness = {layer.name: _Witness(calls, running, counter) for layer in layers}
    feeds = {layer.name: [witness[layer.name]] * parts_of(layer) for layer in layers}
    with replaced(forward.model, {path: partial(record, path) for path in stack_of}), listen(layers, feeds, who=who):
        forward(short_row(batches[0]))
    order = [Place(path, stack_of[path]) for path in dict.fromkeys(calls)]
    turns = _turns(layers, [*dict.fromkeys(calls), *stack_of])
    seen = {block: set().union(*(witness[layer.name].seen for layer in own)) for block, own in turns.items()}
    ends = bool(calls) and ("", len(calls)) not in set().union(*seen.values())
    unseen = tuple(layer.name for layer in layers if is_watched(layer) and not witness[layer.name].seen)
    calls_of = {name: one.places for name, one in witness.items()}
    parts = {block: _parts(own, calls_of) for block, own in turns.items()}
    latest = {block: _latest(own, calls_of) for block, own in turns.items()}
    return Survey(order, inputs, turns, parts, latest, _doubt(calls, seen), ends, unseen)


def prove(forward: Forward, batches: Sequence[Batch], found: Survey) -> str | None:
    """Run the short row once more, one block at a time; return what differs from the plain pass, or None.

    The blocks before the running one are replaced as in the real work, and their outputs are NaN but for the last
    one's: whatever a block gets from further back than that shows.
    """
    given: dict[int, list[torch.Tensor]] = {}

    def watch(number: int, inputs: list[torch.Tensor]) -> None:
        given[number] = _copies(inputs)

    ends = [number for number, place in enumerate(found.order) if place.path in found.turns]
    with States(None) as states:
        replay = Replay(forward, found.order, [short_row(batches[0])], states, watch)
        try:
            for start, end in zip([0, *ends], ends, strict=False):
                replay.run(start, end)
        except Exception as error:
            return f"its blocks do not run one at a time ({type(error).__name__}: {error})"
    for number, place in enumerate(found.order[: max(ends, default=-1) + 1]):
        if number not in given or not _same(given[number], found.inputs[number]):
            return f"{place.path} gets other inputs when the blocks run one at a time"
    return None


def short_row(batch: Batch) -> dict[str, torch.Tensor]:
    """Return the first row with its first and its very last token, at most 16 of them."""
    row = {}
    for key, tensor in batch.items():
        first = tensor[:1]
        # The last token stays: some classifiers look for the end of the sequence.
        row[key] = first if first.shape[1] <= _SHORT else torch.cat([first[:, : _SHORT - 1], first[:, -1:]], dim=1)
    return row


def _turns(layers: Iterable[WeightLayer], blocks: Sequence[str]) -> dict[str, list[WeightLayer]]:
    turns: dict[str, list[WeightLayer]] = {path: [] for path in [*blocks, ""]}
    for layer in layers:
        turns[block_of(layer.path, turns)].append(layer)
    return {path: own for path, own in turns.items() if own}


def _parts(layers: Sequence[WeightLayer], places: Mapping[str, list[tuple[int, int]]]) -> list[Part]:
    stages: dict[int, list[WeightLayer]] = {}
    # A layer that got nothing goes with the last.
    last = max((found[0][0] for layer in layers if (found := places[layer.name])), default=0)
    for layer in layers:
        found = places[layer.name]
        stages.setdefault(found[0][0] if found else last, []).append(layer)
    return [Part(stages[number], _latest(stages[number], places)) for number in sorted(stages)]


def _latest(layers: Sequence[WeightLayer], places: Mapping[str, list[tuple[int, int]]]) -> str | None:
    """Return which of `layers` is called last, if each is called once."""
    if any(is_watched(layer) or len(places[layer.name]) != 1 for layer in layers):
        return None
    return max(layers, key=lambda layer: places[layer.name][0][1]).path


def _doubt(calls: list[str], seen: dict[str, set[tuple[str, int]]]) -> str | None:
    for path in dict.fromkeys(calls):
        if calls.count(path) > 1:
            return f"{path} runs {calls.count(path)} times in a pass"
    for block, places in seen.items():
        elsewhere = {running for running, _ in places} - {block}
        if block and elsewhere:
            return f"layers of {block} are used outside of its own forward"
    return None


def _copies(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    # A block may go on to change its inputs in place.
    return [tensor.clone() for tensor in tensors]


def _same(given: list[torch.Tensor], plain: list[torch.Tensor]) -> bool:
    return len(given) == len(plain) and all(
        one.shape == other.shape and torch.allclose(one, other, rtol=1e-5, atol=1e-6, equal_nan=True)
        for one, other in zip(given, plain, strict=True)
    )
