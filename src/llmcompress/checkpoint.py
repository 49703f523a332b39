"""Folders on disk: written whole or not at all, and checked before they are believed.

A folder is what transformers' `save_pretrained` writes, and `llmcompress.json` beside it: the format version, size and
SHA-256 of each weight file, and what the caller adds (recipe, versions, seed, scores). Weights are safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import CheckpointError, ConfigError
from .places import told_if_unwritable

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

METADATA_FILE = "llmcompress.json"
FORMAT_VERSION = 1
_OWN_KEYS = ("format_version", "files", "weights", "wider")
_CHUNK = 1 << 20
# How images and sounds become inputs; nothing here changes it, and without it a folder cannot be used.
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")


def save(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    metadata: Mapping[str, Any],
) -> Path:
    """Write `model` to `folder`: first beside it, then in one step into its place.

    Args:
        model: a transformers model, quantized or not.
        folder: where to; made if absent. An earlier checkpoint of this library is replaced, anything else is refused.
        tokenizer: written beside the model, if there is one.
        metadata: JSON values for `llmcompress.json`.

    Returns:
        The folder.

    Raises:
        CheckpointError: the folder holds files that no checkpoint wrote, or `metadata` is no JSON or uses the names
            `format_version`, `files`, `weights`, `wider`; or the model or the place cannot be written. Nothing is
            changed then.
        ConfigError: `folder` is no path.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"folder must be a path, got {folder!r:.80}.")
    asked, folder = Path(folder), Path(folder).resolve()
    extra = _checked(metadata)
    refuse_foreign(folder)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.draft")
    try:
        with told_if_unwritable(folder):
            _write(model, tokenizer, draft)
            seal(draft, extra, wider=_wider(model))
            put_in_place(draft, folder)
    finally:
        if draft.exists():
            shutil.rmtree(draft)
    return asked


def _write(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, draft: Path) -> None:
    from .evaluation.inference import bars_hidden  # which needs torch

    draft.mkdir(parents=True)
    # transformers (5.23) cannot undo what it did to read bitsandbytes' tensors, and needs not: they are as on disk.
    plain = getattr(model, "quantization_method", None) == "bitsandbytes"
    with bars_hidden():
        try:
            model.save_pretrained(draft, save_original_format=not plain)
        except ValueError as error:
            raise CheckpointError(
                f"{type(model).__name__} cannot be saved, and is as it was: {error}; mend it (a setting of "
                f"model.generation_config, for instance) and save again."
            ) from error
    write_beside(draft, tokenizer, Path(model.name_or_path) if model.name_or_path else None)


def write_beside(folder: Path, tokenizer: PreTrainedTokenizerBase | None, source: Path | None) -> None:
    """Write what makes inputs: the tokenizer, and what the model's own folder `source` has for images and sounds."""
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    for name in _PROCESSORS:
        if source is not None and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def seal(folder: Path, metadata: Mapping[str, Any], *, wider: Sequence[str] = ()) -> None:
    """Write `llmcompress.json` into a folder in which all other files are: their names, and the weights' hashes.

    Args:
        folder: as it is to stay.
        metadata: JSON values to write beside.
        wider: names of weights that are in a wider dtype than the model's own, in which plain transformers reads all.

    Raises:
        CheckpointError: `metadata` is no JSON, or uses the names `format_version`, `files`, `weights`, `wider`.
    """
    extra = _checked(metadata)
    weights = {path.name: fingerprint(path) for path in sorted(folder.glob("*.safetensors"))}
    files = sorted(path.name for path in folder.iterdir())
    content = {"format_version": FORMAT_VERSION, "files": files, "weights": weights, **extra}
    if wider:
        content["wider"] = list(wider)
    (folder / METADATA_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _checked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    taken = [key for key in _OWN_KEYS if key in metadata]
    if taken:
        raise CheckpointError(f"metadata must not use the key {taken[0]!r}, which {METADATA_FILE} keeps for itself.")
    try:
        found: dict[str, Any] = json.loads(json.dumps(dict(metadata), allow_nan=True))
    except TypeError as error:
        raise CheckpointError(f"metadata must hold JSON values only: {error}.") from error
    return found


def read_metadata(folder: str | Path) -> dict[str, Any]:
    """Read `llmcompress.json`.

    Raises:
        CheckpointError: there is none, it is damaged, or a newer version of the library wrote it.
    """
    path = Path(folder) / METADATA_FILE
    if not Path(folder).is_dir():
        raise CheckpointError(
            f"{folder} must be a folder that save_pretrained of a result wrote; there is no such folder."
        )
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no {METADATA_FILE}: it is not a checkpoint of llmcompress. A plain Hugging Face folder is "
            "read by transformers' AutoModel classes."
        )
    content = _read_json(path)
    version = content.get("format_version")
    if not isinstance(version, int):
        raise CheckpointError(f"{path} must have a format_version, got {version!r}; the file is damaged: save again.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version must be at most {FORMAT_VERSION}, got {version}; it was written by a newer "
            "llmcompress: upgrade it with pip."
        )
    return content


def verify(folder: str | Path) -> dict[str, Any]:
    """Check every file of a checkpoint, the weights by their SHA-256, and return its metadata.

    Raises:
        CheckpointError: not a checkpoint, a newer format, or a file that is missing or damaged; names the file.
    """
    folder = Path(folder)
    content = read_metadata(folder)
    weights, files = _listed(content, folder)
    odd = next((name for name in (*files, *weights) if name != Path(name).name), None)
    if odd is not None:
        raise CheckpointError(f"{folder / METADATA_FILE} must name files of the folder, got {odd!r}; save again.")
    for name in (*files, *weights):
        if not (folder / name).exists():
            raise CheckpointError(f"{folder / name} is missing; copy the folder again, or save the model again.")
    for name, known in weights.items():
        found = fingerprint(folder / name)
        if found != known:
            raise CheckpointError(
                f"{folder / name} is damaged: it must have {fingerprint_text(known)}, got {fingerprint_text(found)}; "
                "copy the folder again, or save the model again."
            )
    _read_json(folder / "config.json")
    return content


def _listed(content: Mapping[str, Any], folder: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return the weights and the files that the metadata of a checkpoint names."""
    weights, files = content.get("weights"), content.get("files")
    if (
        not isinstance(weights, dict)
        or not isinstance(files, list)
        or not all(isinstance(name, str) for name in files)
        or not all(isinstance(known, dict) for known in weights.values())
    ):
        raise CheckpointError(f"{folder / METADATA_FILE} must list files and weights; it is damaged: save again.")
    return weights, files


def load(folder: str | Path, *, model_class: type[PreTrainedModel] | None = None) -> PreTrainedModel:
    """Read a checkpoint after checking it; plain `from_pretrained` reads the same folder without the check.

    Args:
        folder: a folder that `save` wrote, any other Hugging Face folder (unchecked, for want of hashes), or the name
            of a model on the hub.
        model_class: a model or auto class; None takes the class the model had when it was saved. Parts that the folder
            has no weights for, a head for instance, are new then.

    Returns:
        The model in eval mode, in the dtypes it was saved in, on the CPU (one of bitsandbytes on a GPU where there is
        one, as transformers has it).

    Raises:
        CheckpointError: it is no folder of a model, fails `verify`, or its weights do not fill the model; with
            `model_class`, fill nothing of it.
        ConfigError: `folder` is no path or name, or `model_class` no class.
    """
    if not isinstance(folder, (str, Path)):
        raise ConfigError(f"folder must be a folder or the name of a model on the hub, got {folder!r:.80}.")
    if model_class is not None and not isinstance(model_class, type):
        raise ConfigError(f"model_class must be a class of transformers, got {model_class!r:.80}.")
    from .quantization import hf  # noqa: F401 - makes the method known, however this file came to be imported
    from .quantization.bitsandbytes import keep_exact

    wider: Any = ()
    if (Path(folder) / METADATA_FILE).is_file():
        wider = verify(folder).get("wider", ())
    else:
        _refuse_absent(folder)
    chosen: Any = model_class or saved_class(folder)[0]
    try:
        # Where sizes differ transformers raises without naming any, unless it is told to go on and list them.
        model, info = chosen.from_pretrained(
            folder, dtype="auto", output_loading_info=True, ignore_mismatched_sizes=True
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    for name, found, told in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{folder} cannot be loaded: {name} has the shape {tuple(found)}, where config.json tells {tuple(told)}; "
            f"one of the two files was edited or comes from elsewhere: save the model again."
        )
    missing = sorted(info["missing_keys"])
    if missing and model_class is None:
        own = sorted(info["unexpected_keys"])
        why = f"it holds {own[0]} instead, of a module that no config tells" if own else "save the model again"
        raise CheckpointError(f"{folder} has no weights for {', '.join(missing[:4])}; {why}.")
    if missing and missing == sorted(model.state_dict()):
        raise CheckpointError(
            f"{folder} has no weights for any part of {type(model).__name__}; it holds a "
            f"{', '.join(model.config.architectures or ['model of another class'])}: pass another model_class."
        )
    _restore(model, Path(folder), wider)
    keep_exact(model)
    return model


def _wider(model: PreTrainedModel) -> list[str]:
    """Return the names of the float weights that are in a wider dtype than the model."""
    return [
        name
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and weight.dtype.itemsize > model.dtype.itemsize
    ]


def _restore(model: PreTrainedModel, folder: Path, names: Iterable[str]) -> None:
    """Read weights in the dtype that they have in the files of `folder`, where transformers read all in one."""
    from .tensor_files import stored_in, weight_files  # which need torch

    wider = set(names)
    wanted = {name: weight for name, weight in model.named_parameters() if name in wider}
    for file in weight_files(folder) if wanted else ():
        for name, stored in stored_in(file).items():
            if name in wanted and stored.shape == wanted[name].shape:
                wanted[name].data = stored.read().to(wanted[name].device)


def saved_class(folder: str | Path) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return the class that a model had when it was saved, and its config; reads no weight.

    Args:
        folder: a folder, or the name of a model on the hub.

    Raises:
        CheckpointError: it is no folder of a model, or names a class that transformers does not have.
    """
    import transformers

    _refuse_absent(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no folder of a model, and no model on the hub: {error}") from error
    except Exception as error:  # each config's own code reads its fields
        raise CheckpointError(f"{folder}: config.json cannot be read: {type(error).__name__}: {error}") from error
    names = config.architectures
    if not names:
        raise CheckpointError(f"{folder}: config.json names no class under architectures; pass model_class.")
    found = getattr(transformers, str(names[0]), None)
    if found is None:
        raise CheckpointError(
            f"{folder}: transformers {transformers.__version__} has no class {names[0]!r}; upgrade it, or pass "
            "model_class."
        )
    return found, config


def _refuse_absent(folder: str | Path) -> None:
    """Raise unless there is a model in `folder`, or it may be a name on the hub."""
    if Path(folder).exists():
        if not (Path(folder) / "config.json").is_file():
            raise CheckpointError(f"{folder} is no checkpoint: it holds neither {METADATA_FILE} nor config.json.")
    elif isinstance(folder, Path) or Path(folder).is_absolute():
        raise CheckpointError(f"{folder} must be a folder with a model, or a name on the hub; there is no such folder.")


def refuse_foreign(folder: Path) -> None:
    """Raise unless `folder` is absent, empty, or holds nothing but what an earlier `save` wrote."""
    if folder.resolve() == Path.cwd():
        raise CheckpointError(
            f"{folder} is the folder that this process works in, and would be replaced under it; name a folder in it."
        )
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} must be a folder, got a file; choose another name.")
    found = sorted(path.name for path in folder.iterdir())
    if not found:
        return
    if METADATA_FILE not in found:
        raise CheckpointError(
            f"{folder} is not empty and not a checkpoint of llmcompress (it holds {found[0]!r}); choose another folder."
        )
    known = {METADATA_FILE, *_listed(read_metadata(folder), folder)[1]}
    foreign = [name for name in found if name not in known]
    if foreign:
        raise CheckpointError(
            f"{folder} holds {foreign[0]!r}, which no checkpoint wrote and replacing the folder would delete; move it "
            "away or choose another folder."
        )


def put_in_place(draft: Path, folder: Path) -> None:
    """Rename `draft` to `folder`, in place of what is there."""
    if not folder.exists():
        os.replace(draft, folder)
        return
    # A folder cannot replace one that holds files: the old one steps aside first, and comes back if that fails.
    old = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.old")
    os.replace(folder, old)
    try:
        os.replace(draft, folder)
    except OSError:
        os.replace(old, folder)
        raise
    shutil.rmtree(old)


def fingerprint(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error


def fingerprint_text(fingerprint: Mapping[str, Any]) -> str:
    """Write a fingerprint as messages do."""
    return f"{fingerprint.get('bytes')} bytes with SHA-256 {str(fingerprint.get('sha256'))[:12]}..."


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); it is damaged: save the model again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}; save the model again.")
    return content
