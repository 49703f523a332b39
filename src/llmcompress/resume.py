"""Stages of a run kept on disk, so that a run that was killed continues where it stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from .anatomy.digest import model_digest
from .checkpoint import load, read_metadata, save
from .compressor import Compressor, Cut
from .data import find_tokenizer
from .errors import CheckpointError
from .result import StepRecord, library_versions

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data import Example


class Stages:
    """Finished stages in one folder, each under a key that everything before it goes into.

    The key of a stage hashes the weights and the config of the model, what of it is frozen, the data, the seed, the
    library versions and the recipe so far: a changed recipe reuses its unchanged prefix and nothing else.

    Args:
        folder: where the stages are; made if absent.
        model: the model that the run starts from.
        data: the examples of the run.
        seed: the seed of the run.
    """

    def __init__(self, folder: str | Path, model: PreTrainedModel, data: Sequence[Example] | None, seed: int) -> None:
        self._folder = Path(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256(model_digest(model).encode())
        self._digest.update(json.dumps([asdict(example) for example in data or ()]).encode())
        self._digest.update(json.dumps([seed, library_versions(), _frozen(model)]).encode())
        self._count = 0
        self._device = model.device

    def find(
        self, step: Compressor
    ) -> tuple[PreTrainedModel, StepRecord, list[Cut], PreTrainedTokenizerBase | None] | None:
        """Return model, record, cuts and new tokenizer (if any) of the stage that ends with `step`.

        None if it has not been finished.

        Raises:
            CheckpointError: the stage is there but damaged; delete its folder to compute it again.
        """
        stage = self._advance(step)
        if not stage.exists():
            return None
        metadata = read_metadata(stage)
        if "record" not in metadata:
            raise CheckpointError(f"{stage} is no stage of a run (it has no record); delete it or pass another folder.")
        cuts = [Cut(**{**cut, "kept": tuple(cut["kept"])}) for cut in metadata["cuts"]]
        model = load(stage).to(self._device).eval()
        for name in metadata["frozen"]:
            model.get_parameter(name).requires_grad_(False)
        tokenizer = find_tokenizer(model, who="resume_dir") if metadata["tokenizer"] else None
        return model, StepRecord.model_validate(metadata["record"]), cuts, tokenizer

    def keep(
        self,
        model: PreTrainedModel,
        record: StepRecord,
        cuts: Sequence[Cut],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Write the stage that `find` last looked for, atomically, with the tokenizer if the step replaced it."""
        metadata = {
            "record": record.model_dump(mode="json"),
            "cuts": [asdict(cut) for cut in cuts],
            "tokenizer": tokenizer is not None,
            # A file of weights does not tell it, and a later step trains what is not frozen.
            "frozen": _frozen(model),
        }
        # Under torchrun and its like every process comes here, with the same model.
        if os.environ.get("RANK", "0") == "0":
            save(model, self._stage, tokenizer=tokenizer, metadata=metadata)
            shutil.rmtree(self.work_dir, ignore_errors=True)

    @property
    def work_dir(self) -> Path:
        """Where the step that `find` last looked for may keep its unfinished work; gone once it is kept."""
        return self._stage.with_name(f"{self._stage.name}.unfinished")

    def _advance(self, step: Compressor) -> Path:
        self._digest.update(json.dumps(step.to_dict(), sort_keys=True).encode())
        name = step.to_dict()["name"]
        self._stage = self._folder / f"{self._count:02d}-{name}-{self._digest.hexdigest()[:16]}"
        self._count += 1
        return self._stage


def _frozen(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights that training leaves alone."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
