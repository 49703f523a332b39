"""One strategy on one model, verified: cut equals masked, what is saved comes back, the cache is right."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import llmcompress as lc

from ..anatomy.footprint import footprint
from ..anatomy.layers import weight_layers
from ..anatomy.probe import probe_inputs, probe_outputs, relative_error
from ..anatomy.vocabulary import vocabulary_size
from ..compressor import Compressor, Context, still_there
from ..errors import NothingToCompressError, UnsupportedModelError
from ..quantization.hf import mark
from ..testing import tiny_tokenizer
from ..testing.twin import masked_twin
from .worker import Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Sliced and masked networks add the same numbers in another order.
_TOLERANCE = 1e-4
_CACHE_TOLERANCE = 1e-3
# Of a random model, in which a router's choice or a hash turns on little; what computes nonsense differs by 1.4.
_CODED_TOLERANCE = 0.8
# Of the weights in matrices; tables of positions are far too large in a tiny model.
_TOLD_SHARE = 0.1
# With a cache the activations differ by rounding, which moves some of their 7-bit codes by a whole step.
_CODED_CACHE_TOLERANCE = 0.1
# In capitals, whose ids a vocabulary of 64 tokens holds.
_TEXTS = ["A CAT SAT ON A MAT", "THE DOG RAN FAR", "ONE AND TWO IS THREE", "NO RAIN TODAY"]
_NEW_TOKENS = 6
_FIRST_TOKEN = 2


class WrongError(AssertionError):
    """A result is not what it must be; the message says which check found it, with numbers."""


class NoEffectError(Exception):
    """The parts in question have no influence on the outputs."""


@dataclass
class Subject:
    """A dense model with its own behaviour, which a strategy is not blamed for.

    Attributes:
        model: the model; checks work on copies.
        reloads: whether it comes back from its own folder with equal outputs.
        generates: whether it generates the same tokens with a cache as without.
        remarks: what it does not do, for the page.
    """

    model: PreTrainedModel
    reloads: bool = True
    generates: bool = True
    remarks: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: PreTrainedModel) -> Subject:
        """Try out what the dense model does by itself."""
        subject = cls(model)
        try:
            _check_reload(model)
        except Exception as error:  # any model's code runs here
            subject.reloads = False
            subject.remarks.append(f"the dense model does not come back from its own folder ({_brief(error)})")
        try:
            subject.generates = _check_generation(model)
        except Exception as error:
            subject.generates = False
            subject.remarks.append(f"the dense model's cache is not checked ({_brief(error)})")
        return subject


def check(strategy: str, subject: Subject) -> Outcome:
    """Run `strategy`, one of `STRATEGIES`, on a copy of the subject's model and verify what comes out.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> check("ffn", Subject.of(tiny_model("llama")))
        Outcome(status='verified', note='')
    """
    try:
        note = STRATEGIES[strategy](subject)
    except (UnsupportedModelError, NothingToCompressError) as error:
        message = " ".join(str(error).split())
        return Outcome("absent" if "no mixture of experts" in message else "refused", message)
    except NoEffectError as error:
        return Outcome("absent", str(error))
    except WrongError as error:
        return Outcome("failed", str(error))
    except Exception as error:  # a strategy that raises anything but a refusal has failed
        return Outcome("failed", _brief(error))
    return Outcome("verified", "; ".join(filter(None, [note, *subject.remarks])))


def _magnitude(subject: Subject) -> str:
    return _zeros(subject, lc.MagnitudePruning(sparsity=0.5))


def _wanda(subject: Subject) -> str:
    return _zeros(subject, lc.WandaPruning(sparsity=0.5, max_length=32))


def _zeros(subject: Subject, step: Compressor) -> str:
    """Half of the weights become zero, exactly, and all others stay as they were."""
    dense = {name: tensor.clone() for name, tensor in subject.model.state_dict().items()}
    pruned = lc.compress(subject.model, step, data=_texts(subject), tokenizer=tiny_tokenizer(), progress=False).model
    _require(_equal(subject.model.state_dict(), dense), "the caller's model was changed")
    zeros = kept = 0
    for name, tensor in pruned.state_dict().items():
        changed = tensor != dense[name]
        _require(bool((tensor[changed] == 0).all()), f"{name} holds weights that are neither zero nor as they were")
        zeros += int(changed.sum())
        kept += int((tensor == dense[name]).sum()) if bool(changed.any()) else 0
    _require(abs(zeros / max(zeros + kept, 1) - 0.5) < 0.01, f"{zeros} of {zeros + kept} weights are zero, not half")
    _check_saved(subject, pruned)
    return ""


def _ffn(subject: Subject) -> str:
    return _uniform_or_not(subject, ffn=0.5)


def _heads(subject: Subject) -> str:
    """Where there is one key and value head, it must stay: query heads go instead."""
    try:
        return _uniform_or_not(subject, heads=0.5)
    except NothingToCompressError as refusal:
        if "use query_heads" not in str(refusal):
            raise
        return _told("query heads", _uniform_or_not(subject, query_heads=0.5))


def _experts(subject: Subject) -> str:
    return _structured(subject, lc.StructuredPruning(experts=0.25))


def _depth(subject: Subject) -> str:
    return _structured(subject, lc.DepthPruning(ratio=0.5, criterion="last"))


def _texts(subject: Subject) -> list[str]:
    """Return texts that end as some classifiers want them to."""
    end = getattr(subject.model.config.get_text_config(), "eos_token_id", None)
    return [f"{text}{tiny_tokenizer().convert_ids_to_tokens(end)}" if isinstance(end, int) else text for text in _TEXTS]


def _hidden(subject: Subject) -> str:
    return _uniform_or_not(subject, hidden=0.25)


def _vocabulary(subject: Subject) -> str:
    """The cut model answers in its own ids what the dense one does in the old ones."""
    context = Context(tokenizer=tiny_tokenizer())
    step = lc.VocabularyPruning(corpus=tuple(_texts(subject)), round_to=1)
    work = step.compress(copy.deepcopy(subject.model), context).eval()
    kept = torch.tensor(still_there(context.history, "vocabulary") or ())
    _require(0 < len(kept) < vocabulary_size(subject.model), f"{len(kept)} tokens are kept")
    for inputs in _questions(work):
        old = {name: kept[ids] if name.endswith("input_ids") else ids for name, ids in inputs.items()}
        found, expected = probe_outputs(work, inputs), probe_outputs(subject.model, old)
        expected = expected if found.shape == expected.shape else expected[..., kept]
        error = relative_error(found, expected)
        _require(error <= _TOLERANCE, f"the answers differ from those in the old vocabulary by {error:.1e} (relative)")
    _check_saved(subject, work)
    return ""


def _quantization(subject: Subject) -> str:
    """In int8 the model is about the float one; in 4 bits it is the float model of the weights that the codes mean."""
    step = lc.DynamicQuantization()
    work = _coded(subject, step, _CODED_CACHE_TOLERANCE)
    for inputs in _questions(subject.model):
        error = relative_error(probe_outputs(work, inputs), probe_outputs(subject.model, inputs))
        _require(error <= _CODED_TOLERANCE, f"int8 outputs differ from the float model's by {error:.1e} (relative)")
    try:
        packing = lc.WeightOnlyQuantization(bits=4, group_size=16, indivisible="pad", compute="float")
        packed = _coded(subject, packing, _CACHE_TOLERANCE)
    except NothingToCompressError:
        return _told("int8 only", _left_in_float(subject, step))
    plain = lc.dequantize(packed).eval()
    for inputs in _questions(subject.model):
        error = relative_error(probe_outputs(packed, inputs), probe_outputs(plain, inputs))
        _require(error <= _TOLERANCE, f"4-bit outputs differ from those of the weights they mean by {error:.1e}")
    return _left_in_float(subject, step)


def _coded(subject: Subject, step: Compressor, tolerance: float) -> PreTrainedModel:
    """Quantize a copy: finite, smaller, all weights counted, and as it is after saving and with a cache."""
    work = step.compress(copy.deepcopy(subject.model), Context()).eval()
    for inputs in _questions(subject.model):
        _require(bool(torch.isfinite(probe_outputs(work, inputs)).all()), "the outputs hold NaN or infinity")
    before, after = footprint(subject.model), footprint(work)
    _require(after.parameters == before.parameters, f"{after.parameters} weights are counted of {before.parameters}")
    _require(after.disk_bytes < before.disk_bytes, f"{after.disk_bytes} bytes are left of {before.disk_bytes}")
    _check_saved(subject, work, tolerance)
    return work


def _left_in_float(subject: Subject, step: Compressor) -> str:
    left = {action.path for action in step.plan(subject.model, Context()) if not action.touched}
    matrices = [layer for layer in weight_layers(subject.model) if layer.kind != "embedding"]
    numbers = {layer.name: layer.weight.numel() for layer in matrices}
    share = sum(number for name, number in numbers.items() if name in left) / max(sum(numbers.values()), 1)
    return f"{share:.0%} of the matrices stay in float" if share > _TOLD_SHARE else ""


STRATEGIES: dict[str, Callable[[Subject], str]] = {
    "magnitude": _magnitude,
    "wanda": _wanda,
    "ffn": _ffn,
    "heads": _heads,
    "experts": _experts,
    "hidden": _hidden,
    "depth": _depth,
    "vocabulary": _vocabulary,
    "quantization": _quantization,
}
"""The columns of the matrix: each takes a subject, raises where something is wrong, and returns a remark or nothing."""


def _uniform_or_not(subject: Subject, **shares: float) -> str:
    """Ask for sizes that a plain config tells; where none does, for such that load with llmcompress, with a remark."""
    try:
        return _structured(subject, lc.StructuredPruning(**shares))
    except UnsupportedModelError as refusal:
        if "uniform=False" not in str(refusal):
            raise
        return _told("loads with llmcompress", _structured(subject, lc.StructuredPruning(**shares, uniform=False)))


def _structured(subject: Subject, step: Compressor) -> str:
    def compress(model: PreTrainedModel, context: Context) -> PreTrainedModel:
        step.plan(model, context)
        return step.compress(model, context)

    return _cut(subject, compress)


def _cut(subject: Subject, compress: Callable[[PreTrainedModel, Context], PreTrainedModel]) -> str:
    """Cut a copy, and compare it with the twin that its history makes of the dense model."""
    context = Context()
    work = compress(copy.deepcopy(subject.model), context)
    work.eval()
    mark(work)
    with masked_twin(subject.model, context.history) as twin:
        for inputs in _questions(subject.model):
            found, expected = probe_outputs(work, inputs), probe_outputs(twin, inputs)
            error = relative_error(found, expected)
            _require(error <= _TOLERANCE, f"the cut model differs from the masked one by {error:.1e} (relative)")
            if relative_error(found, probe_outputs(subject.model, inputs)) <= _TOLERANCE:
                raise NoEffectError("what would be cut does nothing in this tiny model, so that nothing can be shown")
    before, after = footprint(subject.model).parameters, footprint(work).parameters
    _require(after < before, f"{after} parameters are left of {before}")
    _check_saved(subject, work)
    return ""


def _check_saved(subject: Subject, work: PreTrainedModel, tolerance: float = _CACHE_TOLERANCE) -> None:
    if subject.reloads:
        _check_reload(work)
    if subject.generates:
        _check_generation(work, tolerance)


def _check_reload(model: PreTrainedModel) -> None:
    """Save, load through the class's plain `from_pretrained`, and compare outputs bit by bit."""
    inputs = probe_inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        # Copied: mapped from the file, weights start anywhere in memory, where some products add in another order.
        again = copy.deepcopy(type(model).from_pretrained(Path(folder)))
        expected, found = probe_outputs(model, inputs), probe_outputs(again, inputs)
    _require(
        torch.equal(expected, found), f"reloaded outputs differ by {relative_error(found, expected):.1e} (relative)"
    )


def _check_generation(model: PreTrainedModel, tolerance: float = _CACHE_TOLERANCE) -> bool:
    """Generate greedily with and without a cache, and compare; False where the model does not generate."""
    if not model.can_generate():
        return False
    inputs = probe_inputs(model, rows=1)
    inputs.pop("decoder_input_ids", None)
    wish: dict[str, Any] = {"max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS, "do_sample": False}
    tell: dict[str, Any] = {"num_beams": 1, "return_dict_in_generate": True, "output_logits": True}
    if model.config.is_encoder_decoder and model.generation_config.decoder_start_token_id is None:
        tell["decoder_start_token_id"] = _FIRST_TOKEN
    with torch.inference_mode():
        cached, plain = (model.generate(**inputs, **wish, **tell, use_cache=use) for use in (True, False))
    # Later tokens hang on earlier ones, and these on ties: logits are compared up to the first other token.
    for step, (found, expected) in enumerate(zip(cached.logits, plain.logits, strict=True), start=1):
        error = relative_error(found.float(), expected.float())
        _require(error <= tolerance, f"generated token {step} differs with a cache by {error:.1e} (relative)")
        if not torch.equal(found.argmax(-1), expected.argmax(-1)):
            break
    return True


def _questions(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs of two lengths, the second with padding at the left in one row."""
    yield probe_inputs(model, rows=2, tokens=8, seed=1)
    longer = probe_inputs(model, rows=3, tokens=20, seed=2)
    longer["attention_mask"][0, :5] = 0
    yield longer


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def _told(*remarks: str) -> str:
    return "; ".join(filter(None, remarks))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise WrongError(message)


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
