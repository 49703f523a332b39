"""Run a model up to one of its blocks, with the blocks before it replaced by what they put out last time.

The model itself calls every block, so masks, position biases, rotary tables, cross-attention states and whatever else
an architecture hands to its blocks are right without knowing them. A block that is replaced costs nothing.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ..anatomy.kept import modes_kept
from .states import States

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = Mapping[str, torch.Tensor]


class Stopped(Exception):  # noqa: N818 - no error: the rest of the pass is not needed
    """Ends a forward pass right after the block that is asked for."""


@dataclass(frozen=True)
class Place:
    """One block in the order in which the blocks run.

    Attributes:
        path: the block's path in the model.
        stack: the path of the `ModuleList` it is in.
    """

    path: str
    stack: str


class Forward:
    """Forward passes of `model` in eval mode, without gradients, caches, or logits that nobody needs.

    Args:
        model: the model; its mode is put back after each pass.
        all_logits: whether the output head must see every token.
    """

    def __init__(self, model: PreTrainedModel, *, all_logits: bool) -> None:
        self.model = model
        takes = inspect.signature(model.forward).parameters
        self.options: dict[str, Any] = {"use_cache": False} if "use_cache" in takes else {}
        # A classifier on a decoder hands the argument on, and then looks for the last token among those that were kept.
        if "logits_to_keep" in takes and not all_logits and model.get_output_embeddings() is not None:
            self.options["logits_to_keep"] = 1

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Any:
        """Run one batch and return the model's outputs, or None where the pass was stopped on its way."""
        with modes_kept(self.model):
            self.model.eval()
            try:
                return self.model(**batch, **self.options)
            except Stopped:
                return None


@contextmanager
def replaced(
    model: nn.Module, forwards: Mapping[str, Callable[[Callable[..., Any]], Callable[..., Any]]]
) -> Iterator[None]:
    """Put other functions in place of the `forward` of the modules at these paths, for as long as this is open.

    Args:
        model: the model.
        forwards: for each path, a function from the module's own `forward` to the one that replaces it.
    """
    before: list[tuple[nn.Module, Any]] = []
    try:
        for path, make in forwards.items():
            module = model.get_submodule(path)
            # accelerate, too, puts its functions on the instance: those are kept and called.
            before.append((module, vars(module).get("forward")))
            vars(module)["forward"] = functools.wraps(module.forward)(make(module.forward))
        yield
    finally:
        for module, own in reversed(before):
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own


class Replay:
    """Passes over `batches` that resume at a block instead of at the embeddings.

    Args:
        forward: runs the model.
        order: the blocks in the order in which they run, each once.
        batches: what the model runs on.
        states: keeps what the blocks put out.
        watch: called with a place and the tensors that its block gets, before the block runs.
    """

    def __init__(
        self,
        forward: Forward,
        order: Sequence[Place],
        batches: Sequence[Batch],
        states: States,
        watch: Callable[[int, list[torch.Tensor]], None] | None = None,
    ) -> None:
        self.forward, self.order, self.batches, self.states = forward, order, batches, states
        self._watch = watch
        self._batch = 0
        self._hollow: dict[tuple[int, int], Any] = {}

    def run(self, start: int, end: int | None, *, again: bool = False) -> None:
        """Run blocks `start` to `end` of every batch; the ones before `start` give what they put out before.

        Args:
            start: number of the first block to run; 0, or the `end` of the pass before.
            end: number of the last block to run, after which the pass stops; None runs the model to its end.
            again: whether a later pass begins at `start` as well, and needs the same inputs.
        """
        real = self._latest(start)
        keep = self._latest(end) if end is not None else set()
        forwards: dict[str, Any] = {}
        for number, place in enumerate(self.order[: None if end is None else end + 1]):
            if number < start:
                forwards[place.path] = functools.partial(self._stub, number, number in real, again)
            else:
                forwards[place.path] = functools.partial(self._real, number, number in keep, number == end)
        for number, batch in enumerate(self.batches):
            self._batch = number
            with replaced(self.forward.model, forwards):
                self.forward(batch)

    def _latest(self, end: int) -> set[int]:
        """Return the last block of each stack before block `end`: the ones whose outputs are still to be read."""
        return set({place.stack: number for number, place in enumerate(self.order[:end])}.values())

    def _stub(self, number: int, real: bool, again: bool, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if real:
                kept = self.states[self.order[number].stack, self._batch]
                # A block may change its inputs in place.
                return tree_map(_copy, kept) if again else kept
            return self._hollow[number, self._batch]

        return forward

    def _real(self, number: int, keep: bool, last: bool, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._watch is not None:
                self._watch(number, tensors_of((args, kwargs)))
            outputs = own(*args, **kwargs)
            if last:
                raise Stopped
            self._hollow[number, self._batch] = tree_map(_hollow, outputs)
            if keep:
                self.states[self.order[number].stack, self._batch] = outputs
            return outputs

        return forward


def stopping(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `forward` that ends the pass behind `own`."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        own(*args, **kwargs)
        raise Stopped

    return forward


def stopping_once(complete: Callable[[], bool]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return what makes of a `forward` one that ends the pass as soon as `complete()`, before it computes anything.

    The hooks of its module have seen the inputs by then.
    """

    def made(own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if complete():
                raise Stopped
            return own(*args, **kwargs)

        return forward

    return made


def tensors_of(tree: Any) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists, dicts and transformers' outputs."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _copy(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, torch.Tensor) else leaf


def _hollow(leaf: Any) -> Any:
    # NaN in no memory: wherever a model would read the output of a block further back, it shows.
    if not isinstance(leaf, torch.Tensor):
        return leaf
    fill = float("nan") if leaf.is_floating_point() else 0
    return torch.full((), fill, dtype=leaf.dtype, device=leaf.device).expand(leaf.shape)
