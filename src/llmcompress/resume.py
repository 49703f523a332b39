"""Stages of runs kept on disk, so that a run that was killed goes on where it stopped, and chains share beginnings."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from .anatomy.digest import model_digest, tokenizer_digest
from .checkpoint import fingerprint, load, put_in_place, read_metadata, save
from .compressor import Compressor, Cut
from .data import find_tokenizer
from .errors import BusyError, CheckpointError, ConfigError
from .kept_scores import SCORES
from .locks import locked
from .places import told_if_unwritable
from .processes import writes
from .result import StepRecord, library_versions
from .tensor_files import mark_used, read_sealed, sync, write_sealed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data import Example

_LOG = logging.getLogger(__name__)
_MANIFEST, _LOCKS, _UNFINISHED = "stage.json", "locks", ".unfinished"
# Finished, unfinished, or half written (by a process that was killed, or is at it).
_STAGE = re.compile(r"\.*(?P<stage>\d\d+-\w+-[0-9a-f]{16})(?P<state>\..+)?")
# What a run asks of a stage is kept apart: another run asks something else.
_ASKED = {"score", "fidelity", "verdicts"}
_SECONDS_A_DAY = 86_400


@dataclass(frozen=True)
class Kept:
    """A finished stage on disk.

    Attributes:
        folder: its checkpoint.
        record: what the step did.
        cuts: what it cut.
        replaced: whether it replaced the tokenizer.
        frozen: names of the weights that training leaves alone.
    """

    folder: Path
    record: StepRecord
    cuts: list[Cut]
    replaced: bool
    frozen: tuple[str, ...]

    def model(self, like: PreTrainedModel) -> PreTrainedModel:
        """Load the model, on the CPU and in eval mode, with the attention implementation of `like`.

        Raises:
            CheckpointError: it has been damaged meanwhile.
        """
        model = load(self.folder).eval()
        if model.config._attn_implementation != like.config._attn_implementation:
            model.set_attn_implementation(like.config._attn_implementation)
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model

    def tokenizer(self, model: PreTrainedModel) -> PreTrainedTokenizerBase | None:
        """Load the tokenizer if the step replaced it; `model` is the one of this stage."""
        return find_tokenizer(model, who="resume_dir") if self.replaced else None


class Stages:
    """The stages of one chain in a folder that may hold those of many, each under a key that all before it goes into.

    The key hashes the weights and the config of the model, what of it is frozen, the data, the tokenizer, the seed, the
    library versions, the recipe so far and the files that it names: a changed recipe reuses its unchanged beginning and
    nothing else. A stage is there whole or not at all; what is read of it is checked by hashes, and a damaged one is
    made again.

    Args:
        folder: where the stages are; made if absent.
        model: the model that the run starts from.
        data: the examples of the run.
        seed: the seed of the run.
        tokenizer: the one that the run starts with.

    Raises:
        ConfigError: `folder` is no folder.
        CheckpointError: it cannot be made.
    """

    def __init__(
        self,
        folder: str | Path,
        model: PreTrainedModel,
        data: Sequence[Example] | None,
        seed: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if not isinstance(folder, (str, Path)) or Path(folder).is_file():
            raise ConfigError(f"resume_dir must be a folder, got {folder!r}; it is made where there is none.")
        self.folder = Path(folder)
        with _room_told(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._digest = hashlib.sha256(model_digest(model).encode())
        self._digest.update(json.dumps([asdict(example) for example in data or ()]).encode())
        words = tokenizer_digest(tokenizer) if tokenizer is not None else None
        self._digest.update(json.dumps([seed, library_versions(), _frozen(model), words]).encode())
        self._count = 0
        # Under torchrun and its like every process comes here, with the same model.
        self.writes = writes()

    @property
    def key(self) -> str:
        """The hash of all that the model as it stands has come from."""
        return self._digest.hexdigest()

    @property
    def work_dir(self) -> Path:
        """Where the step that `find` last looked for may keep its unfinished work; gone once it is kept."""
        return self._stage.with_name(f"{self._stage.name}{_UNFINISHED}")

    def find(self, step: Compressor) -> Kept | None:
        """Go on to the stage that ends with `step`, and return it; None if it has not been finished, or is damaged.

        Raises:
            CheckpointError: the folder of this name is no stage.
        """
        self._digest.update(json.dumps(step.to_dict(), sort_keys=True).encode())
        self._digest.update(
            json.dumps([_content(Path(place)) for place in step.reads if Path(place).exists()]).encode()
        )
        self._stage = self.folder / f"{self._count:02d}-{step.to_dict()['name']}-{self.key[:16]}"
        self._count += 1
        kept = self.finished()
        if kept is not None and self.writes:
            # A process that was killed behind its last act left this.
            shutil.rmtree(self.work_dir, ignore_errors=True)
        return kept

    def finished(self) -> Kept | None:
        """Return the stage that `find` last looked for, if it is finished now."""
        stage = self._stage
        if not stage.exists():
            return None
        if not (stage / _MANIFEST).is_file():
            raise CheckpointError(f"{stage} is no stage of a run (it has no {_MANIFEST}); delete it or move it away.")
        try:
            files = read_sealed(stage / _MANIFEST)["files"]
            odd = next((name for name, known in files.items() if fingerprint(stage / name) != known), None)
            if odd is not None:
                raise CheckpointError(f"{stage / odd} is damaged.")
            told = read_metadata(stage)
            record = StepRecord.model_validate(told["record"])
        except (CheckpointError, ValidationError, KeyError) as error:
            _LOG.warning("resume_dir: this stage is made again: %s", error)
            return None
        mark_used(stage / _MANIFEST)
        cuts = [Cut(**{**cut, "kept": tuple(cut["kept"])}) for cut in told["cuts"]]
        return Kept(stage, record, cuts, told["tokenizer"], tuple(told["frozen"]))

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Have no other process work on the stage that `find` last looked for.

        Raises:
            BusyError: one does.
        """
        if not self.writes:
            yield
            return
        busy = (
            f"another process is at work on {self._stage.name} in {self.folder}; wait for it and call again, or choose "
            f"another resume_dir."
        )
        with locked(_lock_of(self._stage), busy):
            # What a process left that was killed while it wrote.
            for draft in self.folder.glob(f".*{self._stage.name}.*"):
                shutil.rmtree(draft, ignore_errors=True)
            yield

    def keep(
        self,
        model: PreTrainedModel,
        record: StepRecord,
        cuts: Sequence[Cut],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> Kept:
        """Write the stage that `find` last looked for: its files, their hashes, and then, in one step, its name.

        Raises:
            CheckpointError: it cannot be written (a full disk); what was there before is as it was.
        """
        kept = Kept(self._stage, record, list(cuts), tokenizer is not None, tuple(_frozen(model)))
        if not self.writes:
            return kept
        metadata = {
            "record": record.model_dump(mode="json", exclude=_ASKED),
            "cuts": [asdict(cut) for cut in cuts],
            "tokenizer": kept.replaced,
            # A file of weights does not tell it, and a later step trains what is not frozen.
            "frozen": list(kept.frozen),
        }
        draft = self._stage.with_name(f".{self._stage.name}.draft")
        try:
            with _room_told(self._stage):
                save(model, draft, tokenizer=tokenizer, metadata=metadata)
                paths = sorted(path for path in draft.rglob("*") if path.is_file())
                files = {path.relative_to(draft).as_posix(): fingerprint(path) for path in paths}
                write_sealed({"files": files}, draft / _MANIFEST)
                for path in (*draft.rglob("*"), draft):
                    sync(path)
                put_in_place(draft, self._stage)
                sync(self.folder)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(self.work_dir, ignore_errors=True)
        return kept


def remove_stages(resume_dir: str | Path, *, unused_days: float = 0.0) -> list[Path]:
    """Delete the stages in a `resume_dir` that no run has used for some days, finished or not, and the scores.

    A stage that a process is at work on is left alone, and so is whatever is no stage.

    Args:
        resume_dir: as for `compress`.
        unused_days: 0 deletes all.

    Returns:
        The folders of stages that are gone.

    Raises:
        ConfigError: there is no such folder, or `unused_days` is negative.

    Example:
        >>> import tempfile
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = lc.compress(tiny_model("bert"), "magnitude_pruning", resume_dir=folder, progress=False)
        ...     len(lc.remove_stages(folder, unused_days=30)), len(lc.remove_stages(folder))
        (0, 1)
    """
    folder = Path(resume_dir)
    if not folder.is_dir():
        raise ConfigError(f"remove_stages() must have a folder, got {str(folder)!r}; there is none.")
    if not unused_days >= 0:
        raise ConfigError(f"remove_stages.unused_days must be at least 0, got {unused_days!r}.")
    oldest, gone = time.time() - unused_days * _SECONDS_A_DAY, []
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        name = _STAGE.fullmatch(path.name)
        # Whatever else has such a name is no stage.
        if name is not None and (name["state"] or (path / _MANIFEST).is_file()):
            found.setdefault(name["stage"], []).append(path)
    for stage, paths in found.items():
        if unused_days and max(map(_last_used, paths)) > oldest:
            continue
        with suppress(BusyError), locked(_lock_of(folder / stage), "in use"):
            for path in paths:
                shutil.rmtree(path)
                gone.append(path)
    for score in (folder / SCORES).glob("*.json"):
        if not unused_days or score.stat().st_mtime <= oldest:
            score.unlink()
    return gone


def _last_used(stage: Path) -> float:
    return max(path.stat().st_mtime for path in (stage, *stage.rglob("*")))


def _content(place: Path) -> dict[str, Any]:
    """Return what tells one state of a file, or of the files of a folder, from another."""
    files = [place] if place.is_file() else [path for path in sorted(place.iterdir()) if path.is_file()]
    return {path.name: fingerprint(path) for path in files}


def _lock_of(stage: Path) -> Path:
    return stage.parent / _LOCKS / f"{stage.name}.lock"


def _room_told(place: Path) -> AbstractContextManager[None]:
    return told_if_unwritable(place, "make room, and call again with the same arguments: what is finished is kept")


def _frozen(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights that training leaves alone."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
