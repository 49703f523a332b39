"""What one step has made of a model so far, on disk: a file for each finished block, and one for the rest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .anatomy.stacks import find_stacks
from .anatomy.turns import block_of, set_keeper
from .checkpoint import fingerprint, fingerprint_text
from .compressor import Action
from .errors import CheckpointError, CompressionError
from .processes import writes
from .quantization.modules import QuantizedModule, replace_modules
from .quantization.schemes import SCHEMES
from .tensor_files import Stored, read_sealed, stored_in, write_sealed, write_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from .compressor import Compressor, Context

_REST = "rest"


class BlockWeights:
    """The weights of a model by block, all in memory; `""` stands for what is in no block.

    Args:
        model: the model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        stacks = find_stacks(model)
        self.blocks = {stack.block_path(index): child for stack in stacks for index, child in enumerate(stack.blocks)}

    def shared(self) -> tuple[str, str] | None:
        """Return two names of one tensor that are in different blocks, or None."""
        owners: dict[int, str] = {}
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            owner = owners.setdefault(id(tensor), name)
            if block_of(owner, self.blocks) != block_of(name, self.blocks):
                return owner, name
        return None

    def tensors(self, path: str) -> dict[str, torch.Tensor]:
        """Return the state of a block, or for `""` of all that is in none, by its names in the model: the very objects.

        A tensor that has several names comes under each.
        """
        if path:
            return self.blocks[path].state_dict(keep_vars=True, prefix=f"{path}.")
        state = self.model.state_dict(keep_vars=True)
        return {name: tensor for name, tensor in state.items() if not block_of(name, self.blocks)}

    def modules(self, path: str) -> dict[str, nn.Module]:
        """Return the modules of a block, or for `""` all that are in none, by their paths in the model."""
        if path:
            found = self.blocks[path].named_modules(prefix=path)
        else:
            found = ((name, one) for name, one in self.model.named_modules() if not block_of(name, self.blocks))
        return dict(found)

    def hold(self, path: str) -> None:
        """Have a block in memory until it is released; here it always is."""

    def release(self, path: str) -> None:
        """Let a block go when others need the room."""

    def move(self, path: str, stored: Mapping[str, Stored]) -> None:
        """Tell where the weights of a block are now on disk."""

    def put(self, path: str, stored: Mapping[str, Stored]) -> None:
        """Have the weights of a block, or of the rest, be those of `stored`."""
        for name, tensor in self.tensors(path).items():
            if name in stored:
                tensor.data = stored[name].read().to(tensor.device)


@contextmanager
def blocks_kept(step: Compressor, model: PreTrainedModel, context: Context) -> Iterator[None]:
    """Keep each block that a long step finishes in `context.work_dir`, and have it begin behind those that are there.

    Long are the steps that work block by block on what blocks before put out for calibration texts. Other steps run as
    they do without, and so do all where blocks share weights.
    """
    folder, weights = context.work_dir, BlockWeights(model)
    long = step.in_turns and "data" in step.needs
    # Under torchrun every process comes here, with the same model.
    if folder is None or not long or weights.shared() is not None or not writes():
        yield
        return
    set_keeper(model, KeptBlocks(folder, weights, context))
    try:
        yield
    finally:
        set_keeper(model, None)


class KeptBlocks:
    """The keeper of a model during one step: finished blocks go to a folder, and come back from it.

    A block is finished when its JSON file is there, which is written after its tensors; both are there whole or not at
    all. So the process may stop at any time: what is not finished is done again.

    Args:
        folder: of this step; made if absent.
        weights: the model's.
        context: of the step; what it tells during a block's turn is kept with the block.
    """

    def __init__(self, folder: Path, weights: BlockWeights, context: Context) -> None:
        self._folder, self._weights, self._context = folder, weights, context
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = {path: number for number, path in enumerate(weights.blocks)}
        self._told = 0
        self._corrected: set[str] = set()
        self._states: dict[str, list[tuple[str, int, int]]] = {}

    def is_finished(self, block: str) -> bool:
        """Whether an earlier run finished the block; the rest is done with the step as a whole."""
        return bool(block) and block not in self._states and self._file(block, "json").is_file()

    def begin(self, block: str) -> None:
        """Bring the block's weights into memory."""
        self._told = len(self._context.told)
        self._corrected = set(self._context.corrected)
        self._weights.hold(block)

    def finish(self, block: str) -> None:
        """Write the block; from then on it comes from that file.

        Raises:
            CheckpointError: it cannot be written; then it counts as not begun.
        """
        if not block:
            return
        told = [action.model_dump() for action in self._context.told[self._told :]]
        self._write(block, {"told": told, "corrected": sorted(self._context.corrected - self._corrected)})
        self._weights.move(block, stored_in(self._file(block, "safetensors")))
        self._weights.release(block)
        self._states[block] = self._state(block)

    def restore(self, block: str) -> None:
        """Put a finished block in the place of the one that the step began with.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        entry = self._read(block)
        model = self._weights.model
        for path, spec in entry["modules"].items():
            module = model.get_submodule(path)
            made = SCHEMES[spec["scheme"]].from_spec(module, spec).train(module.training)
            replace_modules(model, {module: made})
        if not block:
            _tie(model)
        stored = self._stored(block, entry)
        missing = stored.keys() ^ set(_once(self._weights.tensors(block)))
        if missing:
            raise CheckpointError(f"{self._file(block, 'safetensors')} does not fit {block}: {min(missing)}.")
        self._weights.put(block, stored)
        self._context.told.extend(Action(**action) for action in entry["told"])
        self._context.corrected.update(entry["corrected"])
        if block:
            self._states[block] = self._state(block)

    def close(self) -> None:
        """Finish the blocks that had no turn, and write what is in no block.

        Raises:
            CompressionError: the step changed a block after its turn, which what was written does not show.
        """
        for block in self._weights.blocks:
            if block not in self._states:
                if self.is_finished(block):
                    self.restore(block)
                else:
                    self.begin(block)
                    self.finish(block)
            elif self._state(block) != self._states[block]:
                raise CompressionError(
                    f"the step changed {block} after its turn, and cannot be streamed; use lc.compress on the model in "
                    f"memory."
                )
        self._write("", {"told": [], "corrected": []})

    def restore_all(self) -> None:
        """Put everything in its place that a closed stage holds."""
        for block in (*self._weights.blocks, ""):
            self.restore(block)

    def remove(self) -> None:
        """Delete the stage's folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def stored(self) -> dict[str, Stored]:
        """Return where each tensor of a closed stage is."""
        return {
            name: stored
            for block in (*self._weights.blocks, "")
            for name, stored in stored_in(self._file(block, "safetensors")).items()
        }

    def file(self, block: str) -> Path:
        """Return the file with the tensors of a block, or of the rest."""
        return self._file(block, "safetensors")

    def _write(self, block: str, entry: dict[str, Any]) -> None:
        tensors = _once(self._weights.tensors(block))
        file = self._file(block, "safetensors")
        write_tensors({name: tensor.detach() for name, tensor in tensors.items()}, file)
        modules = {
            path: module.spec()
            for path, module in self._weights.modules(block).items()
            if isinstance(module, QuantizedModule)
        }
        write_sealed({"file": fingerprint(file), "modules": modules, **entry}, self._file(block, "json"))

    def _read(self, block: str) -> dict[str, Any]:
        file = self._file(block, "json")
        try:
            return read_sealed(file)
        except FileNotFoundError:
            raise CheckpointError(f"{file} is missing; delete {self._folder} to do the step again.") from None

    def _stored(self, block: str, entry: dict[str, Any]) -> dict[str, Stored]:
        file, known = self._file(block, "safetensors"), entry["file"]
        found = fingerprint(file)
        if found != known:
            raise CheckpointError(
                f"{file} must have {fingerprint_text(known)}, got {fingerprint_text(found)}; delete "
                f"{self._file(block, 'json').name} beside it to do its block again."
            )
        return stored_in(file)

    def _state(self, block: str) -> list[tuple[str, int, int]]:
        return [(name, id(tensor), tensor._version) for name, tensor in self._weights.tensors(block).items()]

    def _file(self, block: str, ending: str) -> Path:
        name = f"block-{self._numbers[block]:05d}" if block else _REST
        return self._folder / f"{name}.{ending}"


def _once(tensors: dict[str, Any]) -> dict[str, Any]:
    """Leave out the further names of a tensor that has several."""
    owners: dict[int, str] = {}
    return {name: tensor for name, tensor in tensors.items() if owners.setdefault(id(tensor), name) == name}


def _tie(model: Any) -> None:
    """Tie what was tied among the modules that have just been put in, as after loading."""
    for target, source in model.all_tied_weights_keys.items():
        tied, partner = (model.get_submodule(key.rpartition(".")[0]) for key in (target, source))
        if isinstance(tied, QuantizedModule) and isinstance(partner, QuantizedModule) and target.endswith("weight"):
            tied.tie(partner)
