"""The finished folder: a shard for each block, an index, the config, and what a checkpoint has beside."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import seal, write_beside
from ..evaluation.inference import bars_hidden
from ..kept_blocks import KeptBlocks
from ..places import told_if_unwritable
from ..tensor_files import stored_in, write_tensors
from .residence import Residence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INDEX = "model.safetensors.index.json"


def assemble(
    residence: Residence,
    stage: KeptBlocks,
    folder: Path,
    *,
    source: Path,
    tokenizer: PreTrainedTokenizerBase | None,
    metadata: Mapping[str, Any],
) -> None:
    """Write a folder that plain `from_pretrained` loads, with the names and shapes that transformers would write.

    Args:
        residence: the model as the last step left it.
        stage: the last step's, closed.
        folder: where to; what is there is deleted.
        source: the folder that the float model lies in.
        tokenizer: written beside, if there is one.
        metadata: JSON values for `llmcompress.json`.

    Raises:
        CheckpointError: a file cannot be written.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    model = residence.model
    if folder.exists():
        shutil.rmtree(folder)
    with told_if_unwritable(folder, "make room, and call again to continue"):
        folder.mkdir(parents=True)
        with bars_hidden():
            # Config, generation config and whatever else belongs to the folder of a model, without its weights.
            model.save_pretrained(folder, state_dict={})
        write_beside(folder, tokenizer, source)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    state = remove_tied_weights_from_state_dict(state, model)
    parts = [*residence.blocks, ""]
    weight_map: dict[str, str] = {}
    total = 0
    for number, block in enumerate(parts, start=1):
        shard = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        own = {name: state[name] for name in residence.tensors(block) if name in state}
        tensors = revert_weight_conversion(model, own)
        if tensors.keys() == stored_in(stage.file(block)).keys() and all(
            own.get(name) is tensors[name] for name in own
        ):
            _link(stage.file(block), shard)
        else:
            write_tensors(tensors, shard)
        weight_map.update(dict.fromkeys(tensors, shard.name))
        total += sum(tensor.nbytes for tensor in tensors.values())
        del own, tensors
        residence.rest()
    index = {
        "metadata": {"total_parameters": model.num_parameters(), "total_size": total},
        "weight_map": weight_map,
    }
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    seal(folder, metadata)


def _link(file: Path, shard: Path) -> None:
    """Give a file a second name where the file system can, so that nothing is written twice."""
    try:
        os.link(file, shard)
    except OSError:
        with told_if_unwritable(shard, "make room, and call again"):
            shutil.copyfile(file, shard)
