"""Every registered strategy keeps the contract on every family, the one of the examples included."""

import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.testing import (
    FAMILIES,
    IMAGE_FAMILIES,
    check_compression,
    check_declaration,
    check_refusal,
    tiny_data,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)

_EXAMPLE = Path(__file__).parent.parent / "examples" / "your_own_strategy.py"
_spec = importlib.util.spec_from_file_location("your_own_strategy", _EXAMPLE)
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

STEPS = {name: lc.compressors.get(name)() for name in lc.compressors if name != "pipeline"}
STEPS["knowledge_distillation"] = lc.KnowledgeDistillation(steps=2, batch_size=4, max_length=16, precision="fp32")
STEPS["pipeline"] = lc.Pipeline(steps=[lc.StructuredPruning(), lc.DynamicQuantization(activations="token")])
# A vocabulary pruned to the same texts once more has nothing left to lose, nor have two blocks when one is gone.
_REFUSED = {("vocabulary_pruning", "vocabulary_pruning"), ("depth_pruning", "depth_pruning")}
# What it works on is images.
_NO_TEXT = {"torch_pruning"}
# In turns, so that every step is tried first and second in an encoder and in a decoder.
PAIRS = [
    (a, b, ("bert", "llama")[(i + j) % 2])
    for (i, a), (j, b) in product(enumerate(STEPS), enumerate(STEPS))
    if not {a, b} & {"pipeline", *_NO_TEXT} and (a, b) not in _REFUSED and not STEPS[a].terminal
]


@pytest.mark.parametrize("name", sorted(STEPS))
def test_declaration(name):
    check_declaration(lc.compressors.get(name))


def test_the_example_is_registered_unasked():
    assert lc.compressors.get("row_pruning").__module__ == "your_own_strategy"
    assert "row_pruning" in STEPS


# Slow on a CPU; test_bitsandbytes.py has every family.
_FEWER = {"bitsandbytes_quantization": ("bert", "gpt2", "llama", "mixtral", "t5")}


# What a step draws or iterates over is the same in all families.
_TWICE = ("bert", "mixtral", *IMAGE_FAMILIES)


def keep_the_contract(name, families, reloads, folder):
    for family in families:
        reloads.append(folder / f"{name}-{family}")
        check_compression(STEPS[name], family, folder=reloads[-1], twice=family in _TWICE)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(STEPS) - _NO_TEXT))
def test_contract_on_every_family(name, reloads, tmp_path):
    keep_the_contract(name, _FEWER.get(name, FAMILIES), reloads, tmp_path)


@pytest.mark.timed
@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("name", sorted(set(STEPS) - _NO_TEXT - set(_FEWER)))
def test_what_each_strategy_leaves_is_timed(name, family):
    model = tiny_model(family)
    result = lc.compress(model, STEPS[name], data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert 0 < result.report.speedup.low <= result.report.speedup.ratio <= result.report.speedup.high


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(_NO_TEXT))
def test_text_models_are_refused_by_what_cannot_work_on_them(name, family):
    check_refusal(STEPS[name], family)


# Convolutional networks have no blocks that these know.
_IMAGES = {
    "torch_pruning": tuple(IMAGE_FAMILIES),
    "dynamic_quantization": tuple(IMAGE_FAMILIES),
    "structured_pruning": ("vit",),
    "magnitude_pruning": ("vit", "convnext"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", _IMAGES)
def test_contract_on_image_families(name, reloads, tmp_path):
    if name == "torch_pruning":
        pytest.importorskip("torch_pruning")
    keep_the_contract(name, _IMAGES[name], reloads, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "family"), PAIRS)
def test_each_step_works_after_each_other(first, second, family):
    model = tiny_model(family)
    steps = [STEPS[first], STEPS[second]]
    result = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert torch.isfinite(result.model(**tiny_inputs(result.model)).logits).all()
    assert result.report.steps[-1].footprint.disk_bytes <= result.report.base.disk_bytes
