"""Float again: every family and scheme gives back a model that computes the same, trains and is saved plain."""

import json
import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import llmcompress as lc
from llmcompress.quantization.modules import QuantizedModule
from llmcompress.testing import FAMILIES, save_expected, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

SCHEMES = {
    "dynamic": lc.DynamicQuantization(),
    "static": lc.StaticQuantization(),
    "packed": lc.WeightOnlyQuantization(bits=3, group_size=32, compute="float"),
    "packed embeddings": lc.WeightOnlyQuantization(
        bits=4, group_size=32, indivisible="pad", compute="float", targets=("*",)
    ),
}


def quantized(family, step):
    model = tiny_model(family)
    return lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False).model


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def tensors(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


CASES = [(family, scheme) for family in FAMILIES for scheme in ("dynamic", "packed")]
CASES += [(family, scheme) for family in ("bert", "gpt2", "llama") for scheme in ("static", "packed embeddings")]


@pytest.mark.parametrize(("family", "scheme"), CASES)
def test_the_float_model_comes_back(family, scheme, tmp_path):
    base, coded = tiny_model(family), quantized(family, SCHEMES[scheme])
    before = tensors(coded)
    plain = lc.dequantize(coded)
    assert all(torch.equal(before[key], value) for key, value in coded.state_dict().items())
    assert [(path, type(module)) for path, module in plain.named_modules()] == [
        (path, type(module)) for path, module in base.named_modules()
    ]
    assert not plain.training
    shapes = {key: (value.shape, value.dtype) for key, value in base.state_dict().items()}
    assert {key: (value.shape, value.dtype) for key, value in plain.state_dict().items()} == shapes
    tied = {key: id(value) for key, value in base.named_parameters(remove_duplicate=False)}
    again = {key: id(value) for key, value in plain.named_parameters(remove_duplicate=False)}
    for one in tied:
        assert {key for key in tied if tied[key] == tied[one]} == {key for key in again if again[key] == again[one]}
    for path, module in coded.named_modules():
        if isinstance(module, QuantizedModule):
            assert module.zero_counts() == [int((weight == 0).sum()) for weight in module.float_weights().values()]
            for name, weight in module.float_weights().items():
                found = getattr(plain.get_submodule(path), name)
                assert torch.equal(found.T if isinstance(plain.get_submodule(path), Conv1D) else found, weight)
    # int8 layers round their inputs too: in models of random weights that moves logits by some percent.
    assert relative(logits(plain), logits(coded)) < (1e-5 if "packed" in scheme else 0.2)
    for name in ("hf_quantizer", "quantization_method"):
        assert getattr(plain, name, None) is None
    assert getattr(plain.config, "quantization_config", None) is None
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path).eval()), logits(plain))
    assert all(parameter.requires_grad for parameter in plain.parameters())
    plain.train()(**tiny_inputs(plain)).logits.sum().backward()
    assert any(bool(p.grad.any()) for p in plain.parameters() if p.grad is not None and p.dim() > 1)


@pytest.mark.parametrize("scheme", ["dynamic", "packed"])
def test_folders_load_without_llmcompress(scheme, plain_reloads, tmp_path):
    plain = lc.dequantize(quantized("gpt2", SCHEMES[scheme]))
    plain.save_pretrained(tmp_path / scheme)
    save_expected(plain, tmp_path / scheme)
    plain_reloads.append(tmp_path / scheme)


def test_pruned_sizes_stay_and_the_result_is_pruned_on(tmp_path):
    pruned = lc.StructuredPruning(ffn=0.25, importance="magnitude")
    model = tiny_model("bert")
    coded = lc.compress(model, [pruned, lc.DynamicQuantization()], progress=False).model
    plain = lc.dequantize(coded)
    assert plain.bert.encoder.layer[0].intermediate.dense.weight.shape == (96, 64)
    assert relative(logits(plain), logits(coded)) < 0.2
    again = lc.compress(
        plain, [lc.MagnitudePruning(sparsity=0.5), lc.WeightOnlyQuantization(group_size=32)], progress=False
    )
    again.save_pretrained(tmp_path)
    assert torch.equal(logits(lc.load(tmp_path)), logits(again.model))


def test_in_place_in_half_precision_and_in_training_mode():
    coded = quantized("llama", lc.DynamicQuantization()).to(torch.bfloat16).train()
    plain = lc.dequantize(coded, inplace=True)
    assert plain is coded
    assert all(module.training for module in plain.modules())
    assert {parameter.dtype for parameter in plain.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_frozen_weights_are_frozen_again(family):
    model = tiny_model(family)
    model.base_model.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {True, False} == set(before.values())
    coded = lc.compress(model, lc.DynamicQuantization(), progress=False).model
    assert {n: p.requires_grad for n, p in lc.dequantize(coded).named_parameters()} == before


def test_what_is_no_model_is_refused():
    result = lc.compress(tiny_model("bert"), lc.DynamicQuantization(), progress=False)
    with pytest.raises(lc.ConfigError, match=r"model must be a transformers model, such as result\.model, got "):
        lc.dequantize(result)


def test_a_float_model_and_an_unknown_method_are_refused():
    with pytest.raises(lc.UnsupportedModelError, match="has float weights already"):
        lc.dequantize(tiny_model("bert"))
    model = tiny_model("bert")
    model.quantization_method = "gptq"
    with pytest.raises(lc.UnsupportedModelError, match="quantized by 'gptq'"):
        lc.dequantize(model)


@pytest.mark.parametrize(("family", "kind"), [("llama", "nf4"), ("gpt2", "nf4"), ("gpt2", "int8"), ("bert", "fp4")])
def test_bitsandbytes_models_come_back(family, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    coded = lc.BitsAndBytesQuantization(kind=kind).compress(tiny_model(family), lc.Context())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = logits(coded)
    plain = lc.dequantize(coded)
    assert [type(module) for module in plain.modules()] == [type(module) for module in tiny_model(family).modules()]
    assert relative(logits(plain), expected) < 0.05
    plain.save_pretrained(tmp_path)
    assert torch.equal(logits(type(plain).from_pretrained(tmp_path)), logits(plain))
    plain(**tiny_inputs(plain)).logits.sum().backward()
    assert isinstance(plain.get_output_embeddings() or nn.Linear(1, 1), nn.Linear)
