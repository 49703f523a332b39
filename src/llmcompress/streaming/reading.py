"""How transformers reads a folder: what it renames, and the blocks whose tensors it merges, splits or casts.

A block that is on disk as it is in memory needs nothing. Any other one (the experts of a mixture, one tensor each on
disk and a 3-D tensor in memory; a checkpoint in another dtype than its config names) is converted by transformers' own
code, one block at a time, and written to a scratch folder as it is in memory.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from ..anatomy.empty import dtype_plan
from ..anatomy.stacks import find_stacks
from ..anatomy.turns import block_of
from ..errors import CheckpointError
from ..tensor_files import Stored, stored_in, write_tensors
from .folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Reading:
    """What becomes of each tensor of a folder.

    Args:
        folder: the folder.
        empty: its model, on the meta device, in the dtype it is to have; left as it was.
    """

    def __init__(self, folder: Folder, empty: PreTrainedModel) -> None:
        self._empty = empty
        self._mapping = get_model_conversion_mapping(empty)
        # Parameters that stay in float32 whatever the dtype of the rest.
        self._plan = dtype_plan(empty, empty.dtype)
        stacks = find_stacks(empty)
        self._blocks = {stack.block_path(index): block for stack in stacks for index, block in enumerate(stack.blocks)}
        self._groups: dict[str, dict[str, Stored]] = defaultdict(dict)
        self._changed: set[str] = set()
        renamings = [entry for entry in self._mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in self._mapping if isinstance(entry, WeightConverter)]
        state = empty.state_dict()
        for name, stored in folder.stored.items():
            target, pattern = rename_source_key(name, renamings, converters, empty.base_model_prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            block = block_of(target, self._blocks)
            self._groups[block][name] = stored
            cast = stored.dtype.is_floating_point and stored.dtype != empty.dtype
            if block and target in state and (pattern is not None or cast or self._plan):
                self._changed.add(block)

    def plain(self) -> dict[str, Stored]:
        """Return the tensors of all that is read as it is, and of what is in no block, by their names on disk."""
        groups = (group for block, group in self._groups.items() if block not in self._changed)
        return {name: stored for group in groups for name, stored in group.items()}

    def converted(self, scratch: Path) -> dict[str, Stored]:
        """Return the tensors of the other blocks by their names in the model, after writing them where that is to do.

        Raises:
            CheckpointError: transformers cannot convert them, or they cannot be written.
        """
        found: dict[str, Stored] = {}
        for number, block in enumerate(self._blocks):
            if block not in self._changed:
                continue
            file = scratch / f"block-{number:05d}.safetensors"
            if not file.is_file():
                scratch.mkdir(parents=True, exist_ok=True)
                write_tensors(self._convert(block), file)
            found.update(stored_in(file))
        return found

    def conversions(self) -> list[Any]:
        """Return those of transformers' conversions that the names of this folder ask for, as loading notes them."""
        # transformers 5.0 does not note which, and reverts all when it saves.
        return [one for one in self._mapping if not hasattr(one, "was_used") or one.was_used()]

    def _convert(self, block: str) -> dict[str, Any]:
        views = {name: stored.view()[0] for name, stored in self._groups[block].items()}
        # None of the other blocks is in `views`, and what of this one is missing shows when the model is filled.
        info, _ = convert_and_load_state_dict_in_model(
            self._empty,
            views,
            LoadStateDictConfig(dtype=self._empty.dtype, dtype_plan=self._plan, weight_mapping=self._mapping),
        )
        module = self._blocks[block]
        state = {f"{block}.{name}": tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}
        module.to("meta")
        if info.conversion_errors or info.mismatched_keys:
            what = next(iter(info.conversion_errors.values()), None) or f"the shape of {min(info.mismatched_keys)[0]}"
            raise CheckpointError(f"the tensors of {block} do not fit the config: {what}; save the model again.")
        return state
