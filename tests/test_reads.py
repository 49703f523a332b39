"""Weights that the code of a model reads past their layer: found, told, and left alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    T5ForConditionalGeneration,
)

import llmcompress as lc
from llmcompress.anatomy.empty import weightless
from llmcompress.anatomy.layers import weight_layers
from llmcompress.anatomy.reads import read_directly
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reading(BertForSequenceClassification):
    """Uses three of its layers in three ways that a layer of codes cannot answer."""

    def __init__(self, config):
        super().__init__(config)
        self.read = nn.Linear(64, 64)
        self.cast = nn.Linear(64, 64)
        self.own = Scaled(64, 64)
        self.called = nn.Linear(64, 64)

    def forward(self, input_ids, attention_mask):
        x = self.bert(input_ids, attention_mask).pooler_output
        x = x @ self.read.weight.T
        x = self.cast(x.to(self.cast.weight.dtype))
        x = self.called(self.own(x))
        assert self.called.weight.shape == (64, 64)
        return (self.classifier(x),)


@pytest.fixture(scope="module")
def reading():
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Reading(BertConfig(**sizes, intermediate_size=64)).eval()


def test_each_way_is_found_with_its_reason(reading):
    before = dict(reading.named_modules())
    found = read_directly(reading)
    assert found == {
        "read": "the code of Reading reads its weight instead of calling it",
        "cast": "the model casts its inputs to the dtype of its weight",
        "own": "Scaled is a linear layer with a forward of its own",
    }
    assert dict(reading.named_modules()) == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in reading.modules())


def test_a_model_is_run_once_as_long_as_its_layers_stay(reading):
    model, runs = Reading(reading.config).eval(), []
    model.register_forward_hook(lambda *_: runs.append(1))
    first = read_directly(model)
    assert runs
    runs.clear()
    assert read_directly(copy.deepcopy(model)) == first
    assert not runs
    model.called = Scaled(64, 64)
    assert read_directly(model).keys() == {*first, "called"}


def test_a_model_without_weights_is_judged_by_its_classes():
    with torch.device("meta"):
        model = Reading(BertConfig(vocab_size=8, hidden_size=64, num_hidden_layers=1, num_attention_heads=2))
    assert list(read_directly(model)) == ["own"]


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma", "opt"}))
def test_nothing_is_found_where_every_layer_is_called(family):
    assert read_directly(tiny_model(family)) == {}


def test_t5_knows_int8_and_no_other_codes():
    found = read_directly(tiny_model("t5"), stored=torch.uint8)
    assert len(found) == 4
    assert all(name.endswith("DenseReluDense.wo") for name in found)


def test_what_is_read_at_the_first_call_is_found_after_it():
    model = build_tiny("causal-lm", "rwkv")
    assert model.rwkv.layers_are_rescaled
    found = read_directly(model)
    wanted = {"rwkv.blocks.0.attention.output", "rwkv.blocks.0.feed_forward.value"}
    linear = {layer.name for layer in weight_layers(model) if layer.kind == "linear"}
    assert {name for name in linear & found.keys() if "blocks.0." in name} == wanted


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("recurrent_gemma", {"input_gate_weight", "recurrent_gate_weight"}),
        ("zamba", {"A_log", "x_proj_weight", "dt_proj_weight"}),
        *((name, set()) for name in ("mixtral", "gpt_oss", "llama4", "jetmoe", "longcat_flash", "inkling_text")),
    ],
)
def test_stacks_of_other_matrices_are_no_experts(architecture, names):
    model = build_tiny("causal-lm", architecture)
    stacks = {layer.name for layer in weight_layers(model) if layer.kind == "experts"}
    assert {name.rpartition(".")[2] for name in stacks & read_directly(model).keys()} == names


def test_mamba_is_quantized_but_for_what_it_reads():
    model = build_tiny("causal-lm", "mamba")
    with torch.no_grad():
        expected = model(**tiny_inputs(model)).logits
        plan = {action.path: action for action in lc.DynamicQuantization().plan(model, lc.Context())}
        int8 = lc.DynamicQuantization().compress(model, lc.Context())
        found = int8(**tiny_inputs(model)).logits
    assert plan["backbone.layers.0.mixer.in_proj"].touched
    assert "instead of calling it" in plan["backbone.layers.0.mixer.dt_proj"].reason
    assert (found - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("family", ["gemma", "mixtral", "opt", "t5", "vit"])
def test_a_model_without_weights_reads_the_same(family):
    model = tiny_model(family)
    assert read_directly(weightless(model)) == read_directly(model)


def test_without_weights_a_pass_is_followed_as_far_as_it_goes():
    model = MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1)).eval()
    found = read_directly(weightless(model))
    assert found == read_directly(model)
    assert {name.rpartition(".")[2] for name in found} == {"dt_proj", "lm_head"}


def test_layers_that_stay_in_float32_are_quantized_in_a_model_of_float16(tmp_path):
    tiny_model("t5").save_pretrained(tmp_path / "in")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "in", dtype=torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16, torch.float32}
    inputs = tiny_inputs(model)
    result = lc.compress(model, lc.DynamicQuantization(), progress=False)
    with torch.no_grad():
        expected, found = model(**inputs).logits.float(), result.model(**inputs).logits.float()
        result.save_pretrained(tmp_path / "out")
        again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
        assert torch.equal(again(**inputs).logits.float(), found)
    assert float((found - expected).norm() / expected.norm()) < 0.1
