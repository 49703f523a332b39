"""Which blocks of a model are in memory: those whose turn it is, and the two that ran last."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from ..anatomy.turns import block_of, let_go, set_mapping
from ..errors import UnsupportedModelError
from ..kept_blocks import BlockWeights
from ..tensor_files import Stored, trim_heap

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

# A block and the one before it, whose outputs it is calibrated on.
_AT_ONCE = 2
# Smaller tensors (norms, biases) stay in memory for good.
_SMALL_BYTES = 1 << 14


class Residence(BlockWeights):
    """Keeps the weights of blocks on disk while they are not used.

    A block that rests is made of views of files: its weights can be read at any time, which takes memory only as long
    as the system has some to spare. To run, and in its turn, a block has its weights in memory.

    Args:
        model: every tensor of its state lies in a file.
        stored: where, by the names of `state_dict`; tensors of blocks that are not named stay in memory.

    Raises:
        UnsupportedModelError: blocks share weights with each other or with the rest of the model.
    """

    def __init__(self, model: PreTrainedModel, stored: Mapping[str, Stored]) -> None:
        super().__init__(model)
        self._refuse_shared()
        self._places: dict[str, list[tuple[torch.Tensor, Stored]]] = {path: [] for path in self.blocks}
        self._present: list[str] = []  # least recently used first
        self._held: set[str] = set()
        for path, block in self.blocks.items():
            vars(block)["forward"] = functools.wraps(block.forward)(self._running(path, block.forward))
        done: set[int] = set()
        for name, tensor in model.state_dict(keep_vars=True).items():
            if name in stored and id(tensor) not in done and not block_of(name, self.blocks):
                done.add(id(tensor))
                tensor.data = stored[name].read()
        for path in self.blocks:
            self.move(path, stored)
            self._leave(path)

    def __enter__(self) -> Residence:
        return self

    def __exit__(self, *_: object) -> None:
        for block in self.blocks.values():
            vars(block).pop("forward", None)

    def hold(self, path: str) -> None:
        """Bring a block into memory, and keep it there until it is released."""
        if path:
            self._use(path)
            self._held.add(path)

    def release(self, path: str) -> None:
        """Let a block go when others need the room."""
        self._held.discard(path)

    def move(self, path: str, stored: Mapping[str, Stored]) -> None:
        """Have the weights of a block come from elsewhere from now on; what it holds in memory stays."""
        tensors = self.tensors(path)
        kept = {id(tensor) for tensor in tensors.values()}
        for tensor, place in self._places[path] if path in self._present else ():
            # Replaced, but whoever chose the layers may still hold the old one: it must not take memory any more.
            if id(tensor) not in kept:
                tensor.data, _ = place.view()
        self._places[path] = [(tensor, stored[name]) for name, tensor in tensors.items() if name in stored]

    def put(self, path: str, stored: Mapping[str, Stored]) -> None:
        """Have the weights of a block, or of the rest, be those of `stored`, and forget what it had."""
        if path:
            self.move(path, stored)
            self._present = [one for one in self._present if one != path]
            self._leave(path)
        else:
            for name, tensor in self.tensors("").items():
                if name in stored:
                    tensor.data = stored[name].read()

    def rest(self) -> None:
        """Let all blocks go that nobody holds."""
        for path in [path for path in self._present if path not in self._held]:
            self._present.remove(path)
            self._leave(path)

    def _running(self, path: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            self._use(path)
            return own(*args, **kwargs)

        return forward

    def _use(self, path: str) -> None:
        if path in self._present:
            self._present.remove(path)
        else:
            spare = [one for one in self._present if one not in self._held]
            while len(self._present) >= _AT_ONCE and spare:
                self._present.remove(spare[0])
                self._leave(spare.pop(0))
            with _unwatched():
                for tensor, place in self._places[path]:
                    let_go(tensor)
                    tensor.data = place.read()
                    set_mapping(tensor, None)
        self._present.append(path)

    def _leave(self, path: str) -> None:
        # Layers throw away what they have made of their weights for a kernel when they are moved.
        for module in self.blocks[path].modules():
            if hasattr(module, "derived_bytes"):
                module._apply(lambda tensor: tensor)
        with _unwatched():
            for tensor, place in self._places[path]:
                if place.nbytes > _SMALL_BYTES:
                    tensor.data, mapping = place.view()
                    set_mapping(tensor, mapping)
                else:
                    tensor.data = place.read()
        trim_heap()

    def _refuse_shared(self) -> None:
        shared = self.shared()
        if shared is not None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} cannot be streamed: {shared[0]} and {shared[1]} are one tensor, in "
                f"different blocks; load the model and pass it to lc.compress."
            )


@contextmanager
def _unwatched() -> Iterator[None]:
    """Move weights unseen: in inference mode they could never be written to again, and some watch for reads."""
    with torch.inference_mode(False), torch._C.DisableTorchFunction():
        yield
