"""What one step has made of a model so far, on disk: a file for each finished block, and one for the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compressor import Action
from ..errors import CheckpointError, CompressionError
from ..quantization.modules import QuantizedModule, replace_modules
from ..quantization.schemes import SCHEMES
from .residence import Residence
from .tensors import Stored, stored_in, write_json, write_tensors

if TYPE_CHECKING:
    from ..compressor import Context

_REST = "rest"


class Stage:
    """The keeper of a streamed model during one step: finished blocks go to a folder, and come back from it.

    A block is finished when its JSON file is there, which is written after its tensors; both are there whole or not at
    all. So the process may stop at any time: what is not finished is done again.

    Args:
        folder: of this step; made if absent.
        residence: the model's weights.
        context: of the step; what it tells during a block's turn is kept with the block.
    """

    def __init__(self, folder: Path, residence: Residence, context: Context) -> None:
        self._folder, self._residence, self._context = folder, residence, context
        folder.mkdir(parents=True, exist_ok=True)
        self._numbers = {path: number for number, path in enumerate(residence.blocks)}
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
        self._residence.hold(block)

    def finish(self, block: str) -> None:
        """Write the block; from then on it comes from that file.

        Raises:
            CheckpointError: it cannot be written; then it counts as not begun.
        """
        if not block:
            return
        told = [action.model_dump() for action in self._context.told[self._told :]]
        self._write(block, {"told": told, "corrected": sorted(self._context.corrected - self._corrected)})
        self._residence.move(block, stored_in(self._file(block, "safetensors")))
        self._residence.release(block)
        self._states[block] = self._state(block)

    def restore(self, block: str) -> None:
        """Put a finished block in the place of the one that the step began with.

        Raises:
            CheckpointError: its file is missing or damaged.
        """
        entry = self._read(block)
        model = self._residence.model
        for path, spec in entry["modules"].items():
            module = model.get_submodule(path)
            made = SCHEMES[spec["scheme"]].from_spec(module, spec).train(module.training)
            replace_modules(model, {module: made})
        if not block:
            _tie(model)
        stored = self._stored(block, entry)
        missing = stored.keys() ^ set(_once(self._residence.tensors(block)))
        if missing:
            raise CheckpointError(f"{self._file(block, 'safetensors')} does not fit {block}: {min(missing)}.")
        self._residence.put(block, stored)
        self._context.told.extend(Action(**action) for action in entry["told"])
        self._context.corrected.update(entry["corrected"])
        if block:
            self._states[block] = self._state(block)

    def close(self) -> None:
        """Finish the blocks that had no turn, and write what is in no block.

        Raises:
            CompressionError: the step changed a block after its turn, which what was written does not show.
        """
        for block in self._residence.blocks:
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
        for block in (*self._residence.blocks, ""):
            self.restore(block)

    def remove(self) -> None:
        """Delete the stage's folder."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def stored(self) -> dict[str, Stored]:
        """Return where each tensor of a closed stage is."""
        return {
            name: stored
            for block in (*self._residence.blocks, "")
            for name, stored in stored_in(self._file(block, "safetensors")).items()
        }

    def file(self, block: str) -> Path:
        """Return the file with the tensors of a block, or of the rest."""
        return self._file(block, "safetensors")

    def _write(self, block: str, entry: dict[str, Any]) -> None:
        tensors = _once(self._residence.tensors(block))
        file = self._file(block, "safetensors")
        write_tensors({name: tensor.detach() for name, tensor in tensors.items()}, file)
        modules = {
            path: module.spec()
            for path, module in self._residence.modules(block).items()
            if isinstance(module, QuantizedModule)
        }
        write_json({"bytes": file.stat().st_size, "modules": modules, **entry}, self._file(block, "json"))

    def _read(self, block: str) -> dict[str, Any]:
        file = self._file(block, "json")
        try:
            entry: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return {key: entry[key] for key in ("bytes", "modules", "told", "corrected")}
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); delete it to do its block again.") from error

    def _stored(self, block: str, entry: dict[str, Any]) -> dict[str, Stored]:
        file = self._file(block, "safetensors")
        size = file.stat().st_size if file.is_file() else 0
        if size != entry["bytes"]:
            raise CheckpointError(
                f"{file} must have {entry['bytes']} bytes, got {size}; delete {self._file(block, 'json').name} beside "
                f"it to do its block again."
            )
        return stored_in(file)

    def _state(self, block: str) -> list[tuple[str, int, int]]:
        return [(name, id(tensor), tensor._version) for name, tensor in self._residence.tensors(block).items()]

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
