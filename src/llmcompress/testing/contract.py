"""The contract of a strategy, as checks that raise `AssertionError` with what was broken."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pydantic
import torch
import yaml
from safetensors.torch import load_file, save_file

from .. import pipeline
from ..anatomy.probe import probe_outputs, relative_error
from ..compressor import Compressor
from ..errors import CompressionError, MissingInputError, NothingToCompressError, UnsupportedModelError
from ..registry import compressors
from .families import tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..result import Result

_EXPECTED = "expected.safetensors"
_FRESH_PROCESS = """
import sys
import torch
import transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)


def reload(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype="auto").eval()
    expected = load_file(folder + "/expected/expected.safetensors")
    logits = expected.pop("logits")
    with torch.inference_mode():
        save_file({"logits": model(**expected).logits.float().contiguous()}, folder + "/expected/reloaded.safetensors")


plain = int(sys.argv[1])
for number, folder in enumerate(sys.argv[2:]):
    if number == plain:
        import llmcompress
    try:
        reload(folder)
    except Exception as error:
        with open(folder + "/expected/error.txt", "w") as file:
            file.write(f"{type(error).__name__}: {error}")
    assert number >= plain or "llmcompress" not in sys.modules
"""


def check_declaration(cls: type[Compressor]) -> None:
    """Check what a strategy says of itself, without any model.

    It is built without arguments, immutable, equal to itself after a trip through a dict and through YAML; each field
    has a description and is named in the docstring, which also names a source.

    Example:
        >>> import llmcompress as lc
        >>> check_declaration(lc.MagnitudePruning)
    """
    step = cls()
    name = compressors.name_of(cls)
    _require(compressors.get(name) is cls, f"the registry gives another class for {name!r}")
    _require(compressors.create(step.to_dict()) == step, f"{cls.__name__} changes on its way through a dict")
    again = compressors.create(yaml.safe_load(yaml.safe_dump(step.to_dict())))
    _require(again == step, f"{cls.__name__} changes on its way through YAML")
    doc = cls.__doc__ or ""
    for field, info in cls.model_fields.items():
        _require(bool(info.description), f"{cls.__name__}.{field} has no description")
        _require(f"{field}:" in doc, f"the docstring of {cls.__name__} does not explain {field!r}")
        try:
            setattr(step, field, None)
        except pydantic.ValidationError:
            continue
        raise AssertionError(f"{cls.__name__}.{field} can be assigned: the class is not frozen")
    if cls is not pipeline.Pipeline:
        sources = ("arXiv", "http", "doi")
        _require(any(word in doc for word in sources), f"the docstring of {cls.__name__} names no source (arXiv, URL)")


def check_compression(
    step: Compressor,
    family: str,
    *,
    folder: Path | None = None,
    twice: bool = True,
    device: torch.device | str = "cpu",
) -> Result:
    """Check a run of `step` on the tiny model of `family`.

    The caller's model stays bit-identical, and its mode; the result is smaller or sparser, or the step says what else
    it did; outputs have the same shape (but for tokens that are gone) and are finite; the same seed gives the same
    weights; missing inputs and targets that match nothing are refused with the model untouched; generating with a cache
    equals generating without; a terminal step's model accepts no further step.

    Args:
        step: the strategy with its fields.
        family: one of `FAMILIES` or `IMAGE_FAMILIES`.
        folder: where the result is saved for `check_reloads`, or None.
        twice: whether it runs once more, to see that the same seed gives the same weights.
        device: where the model is.

    Returns:
        The result of the run.

    Example:
        >>> import llmcompress as lc
        >>> check_compression(lc.MagnitudePruning(), "bert").model.training
        True
    """
    model = tiny_model(family).to(device).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    data = tiny_data(model)
    result = _run(step, model, data)
    _check_refusals(step, model, data)
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _require(same and model.config.to_dict() == config, f"{step} changed the caller's {family} model")
    _require(result.model.training, f"{step} did not give the model back in train mode")
    _require(result.model.device == model.device, f"{step} moved the model from {model.device}")
    _check_gain(step, result)
    inputs = tiny_inputs(result.model)
    logits, base = probe_outputs(result.model, inputs), _asked_the_same(model, inputs, result)
    _require(logits.shape == base.shape, f"{step} changed the output's shape on {family}")
    _require(bool(torch.isfinite(logits).all()), f"{step} gives NaN or infinity on {family}")
    if twice:
        again = probe_outputs(_run(step, model, data).model, inputs)
        _require(torch.equal(again, logits), f"{step} gives another {family} model for the same seed")
    _check_terminal(step, result.model)
    if model.can_generate():
        _check_cache(step, result.model, inputs)
    if folder is not None:
        _save(result, folder)
    return result


def check_refusal(step: Compressor, family: str) -> None:
    """Check that `step` refuses the tiny model of `family` with an `UnsupportedModelError`, and leaves it as it is.

    Example:
        >>> import llmcompress as lc
        >>> check_refusal(lc.StructuredPruning(), "resnet")
    """
    model = tiny_model(family).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    _refused(UnsupportedModelError, step, model, data=tiny_data(model), tokenizer=tiny_tokenizer())
    same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    _require(same and model.config.to_dict() == config, f"{step} changed the {family} model that it refused")
    _require(model.training, f"{step} did not leave the {family} model in train mode")


def save_expected(model: PreTrainedModel, folder: Path, inputs: Mapping[str, torch.Tensor] | None = None) -> None:
    """Write beside a saved model what `check_reloads` will ask it: `inputs`, and the logits that they give now.

    Args:
        model: what the folder holds.
        folder: where it was saved.
        inputs: of one forward pass; None takes the tiny ones.
    """
    inputs = tiny_inputs(model) if inputs is None else inputs
    (folder / "expected").mkdir()
    save_file({**inputs, "logits": probe_outputs(model, inputs).contiguous()}, folder / "expected" / _EXPECTED)


def check_reloads(folders: Sequence[Path], *, plain: Sequence[Path] = ()) -> None:
    """Load folders in one fresh process that uses nothing but `from_pretrained`, and compare the logits.

    Starting the process takes seconds, whatever the number of folders: give it many at once.

    Args:
        folders: that `check_compression` or `save_expected` wrote to; the process imports llmcompress for them.
        plain: the same for folders that must load without llmcompress: they are read before it is imported.
    """
    folders = [*plain, *folders]
    command = [sys.executable, "-c", _FRESH_PROCESS, str(len(plain)), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    _require(done.returncode == 0, f"the fresh process failed:\n{done.stderr[-4000:]}")
    broken = [f"{folder} {told}" for folder in folders if (told := _told_of(folder / "expected")) is not None]
    _require(not broken, "\n".join(broken))


def _told_of(folder: Path) -> str | None:
    """Return what went wrong when the fresh process loaded the model beside `folder`, or None."""
    if (folder / "error.txt").is_file():
        return f"does not load: {(folder / 'error.txt').read_text()}"
    expected, reloaded = (load_file(folder / name)["logits"] for name in (_EXPECTED, "reloaded.safetensors"))
    error = relative_error(reloaded, expected)
    return f"comes back with other logits (relative error {error:.1e})" if not error < 1e-5 else None


def _run(step: Compressor, model: PreTrainedModel, data: Any) -> Result:
    return pipeline.compress(model, step, data=data, tokenizer=tiny_tokenizer(), progress=False)


def _asked_the_same(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], result: Result) -> torch.Tensor:
    """Return the base's logits for the same tokens, which it may know by other ids, and of no others."""
    assert result.tokenizer is not None
    old, new = tiny_tokenizer().get_vocab(), result.tokenizer.get_vocab()
    tokens = torch.tensor([old[name] for name in sorted(new, key=new.__getitem__)], device=model.device)
    base = probe_outputs(model, {key: tokens[ids] if key.endswith("ids") else ids for key, ids in inputs.items()})
    return base[..., tokens] if model.get_output_embeddings() is not None else base


def _check_refusals(step: Compressor, model: PreTrainedModel, data: Any) -> None:
    if "data" in step.needs:
        _refused(MissingInputError, step, model, data=None, tokenizer=tiny_tokenizer())
        _refused(MissingInputError, step, model, data=[], tokenizer=tiny_tokenizer())
    if "tokenizer" in step.needs:
        _refused(MissingInputError, step, model, data=data)
    if "teacher" in step.needs:
        _refused(MissingInputError, step, model, data=data, tokenizer=tiny_tokenizer(), inplace=True)
    if "targets" in type(step).model_fields:
        aimless = step.model_copy(update={"targets": ("no.such.layer",)})
        _refused(NothingToCompressError, aimless, model, data=data, tokenizer=tiny_tokenizer())


def _refused(error: type[CompressionError], step: Compressor, model: PreTrainedModel, **inputs: Any) -> None:
    try:
        pipeline.compress(model, step, progress=False, **inputs)
    except error:
        return
    raise AssertionError(f"{step} does not refuse with {error.__name__}: {sorted(inputs)}")


def _check_gain(step: Compressor, result: Result) -> None:
    base, record = result.report.base, result.report.steps[-1]
    size = record.footprint
    gained = size.disk_bytes < base.disk_bytes or size.zeros > base.zeros
    told = any(action.path == "" and action.reason for action in (*record.touched, *record.left))
    _require(gained or told, f"{step} made the model neither smaller nor sparser, and does not say what it did")
    _require(bool(record.touched), f"{step} reports nothing touched")
    _require(all(action.reason for action in record.left), f"{step} leaves a layer without a reason")


def _check_terminal(step: Compressor, model: PreTrainedModel) -> None:
    try:
        pipeline.compress(copy.deepcopy(model), "magnitude_pruning", inplace=True, progress=False)
    except UnsupportedModelError:
        refused = True
    except NothingToCompressError:  # a float model, with no matrices in blocks
        refused = False
    else:
        refused = False
    _require(refused == step.terminal, f"{type(step).__name__}.terminal is {step.terminal}, which is not so")


def _check_cache(step: Compressor, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
    """Compare the logits of the last token, computed at once and behind a cache of the tokens before it."""
    model = copy.deepcopy(model).eval()
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    tokens = inputs[key]
    fixed = {name: tensor for name, tensor in inputs.items() if name != key and model.config.is_encoder_decoder}
    with torch.inference_mode():
        whole = model(**fixed, **{key: tokens}, use_cache=False).logits[:, -1]
        cache = model(**fixed, **{key: tokens[:, :-1]}, use_cache=True).past_key_values
        behind = model(**fixed, **{key: tokens[:, -1:]}, past_key_values=cache, use_cache=True).logits[:, -1]
    # One range for all activations of a call: a call of one token rounds them otherwise than a call of many.
    tolerance = 0.1 if getattr(step, "activations", None) == "tensor" else 1e-3
    error = relative_error(behind.float(), whole.float())
    _require(error < tolerance, f"{step}: logits behind a cache differ from those without by {error:.1e} (relative)")


def _save(result: Result, folder: Path) -> None:
    result.save_pretrained(folder)
    predicted = result.report.steps[-1].footprint.disk_bytes
    written = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    _require(written == predicted, f"{folder.name}: {written} bytes on disk where the report says {predicted}")
    save_expected(result.model, folder)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
