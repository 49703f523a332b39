"""int8: the arithmetic, the two kernels against each other, the layers, the strategy on every family, the format."""

import copy
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForPreTraining
from transformers.pytorch_utils import Conv1D

import llmcompress as lc
from llmcompress.anatomy.footprint import footprint
from llmcompress.quantization import kernels
from llmcompress.quantization.affine import activation_range, dequantize_rows, quantize_rows
from llmcompress.quantization.modules import Int8Embedding, Int8Linear, QuantizedModule
from llmcompress.quantization.static_modules import Int8StaticLinear
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import FAMILIES, save_expected, tiny_inputs, tiny_model

needs_copy = pytest.mark.skipif(
    not kernels.takes_copy(torch.empty(8, 16)), reason="neither native kernels nor fbgemm are here"
)
needs_fbgemm = pytest.mark.skipif(not kernels.has_fbgemm(torch.device("cpu")), reason="this torch has no fbgemm")


def quantized(family="llama", **fields):
    return lc.DynamicQuantization(**fields).compress(tiny_model(family), lc.Context())


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# -- arithmetic ---------------------------------------------------------------------------------------------------


def test_rows_are_coded_as_computed_by_hand():
    codes, scale = quantize_rows(torch.tensor([[-2.0, 1.0, 0.5], [0.0, 0.0, 0.0], [0.1, -0.05, 0.0]]))
    assert codes.tolist() == [[-127, 64, 32], [0, 0, 0], [127, -64, 0]]  # 63.5 rounds to even
    torch.testing.assert_close(scale[[0, 2]], torch.tensor([2.0, 0.1]) / 127)
    assert scale[1] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_of_a_weight_is_at_most_half_a_step(dtype):
    weight = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, scale = quantize_rows(weight)
    assert ((dequantize_rows(codes, scale) - weight.float()).abs() <= 0.5001 * scale.unsqueeze(1)).all()


def test_activation_range_codes_zero_exactly_and_covers_all():
    for values in ([-1.0, 3.0], [2.0, 5.0], [-4.0, -1.0], [0.0, 0.0]):
        x = torch.tensor(values)
        scale, zero = activation_range(x, 255)
        codes = torch.round(x / scale) + zero
        assert zero == zero.round()
        assert 0 <= zero <= 255
        assert codes.min() >= 0
        assert codes.max() <= 255


# -- kernels ------------------------------------------------------------------------------------------------------


@needs_fbgemm
@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 96), (0, 96)])
def test_torch_fallback_equals_fbgemm_within_a_rounding_step(activations, bias, shape):
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_rows(torch.randn(40, 96, generator=generator))
    added = torch.randn(40, generator=generator) if bias else None
    x = torch.randn(shape, generator=generator) * 3 + 0.5
    packed = kernels.pack(weight, scale, added, activations)
    fast = kernels.fbgemm_linear(x, packed, added, activations)
    plain = kernels.torch_linear(x, weight, scale, added, activations)
    assert fast.shape == plain.shape
    # One activation that falls on the border of two codes moves an output by at most one step times the largest weight.
    step = (x.max() - x.min()) / 255 if x.numel() else torch.tensor(0.0)
    assert (fast - plain).abs().max().item() <= 1.01 * float(step * scale.max() * 127) if x.numel() else True
    if x.numel():
        exact = x @ dequantize_rows(weight, scale).T + (added if bias else 0)
        assert relative(fast, exact) < 0.02


def test_one_scale_a_row_makes_rows_independent_of_their_batch():
    layer = Int8Linear.from_float(nn.Linear(64, 32), "token")
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 6).unsqueeze(1)
    with torch.no_grad():
        alone = torch.cat([layer(row.unsqueeze(0)) for row in x])
        assert torch.equal(layer(x), alone)
        per_tensor = Int8Linear.from_float(nn.Linear(64, 32), "tensor")
        assert not torch.equal(per_tensor(x)[:1], per_tensor(x[:1]))


# -- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize("fallback", [True, False])
def test_linear_takes_any_shape_and_float_dtype(activations, fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(kernels, "takes_copy", lambda weight: False)
    linear = nn.Linear(48, 20)
    layer = Int8Linear.from_float(linear, activations)
    with torch.no_grad():
        for shape in ((48,), (3, 48), (2, 3, 48), (0, 48), (2, 0, 48)):
            assert layer(torch.randn(shape)).shape == (*shape[:-1], 20)
        x = torch.randn(9, 48)
        assert relative(layer(x), linear(x)) < 0.03
        for dtype in (torch.bfloat16, torch.float16):
            assert layer(x.to(dtype)).dtype == dtype
            assert relative(layer(x.to(dtype)).float(), linear(x)) < 0.04
        assert layer(torch.zeros(2, 48)).isfinite().all()
    assert layer.derived_bytes() == 0 if fallback else layer.derived_bytes() >= 20 * 48


def test_conv1d_is_stored_transposed():
    conv = Conv1D(12, 8)
    layer = Int8Linear.from_float(conv)
    assert layer.weight.shape == (12, 8)
    with torch.no_grad():
        x = torch.randn(2, 5, 8)
        assert relative(layer(x), conv(x)) < 0.03


def test_embedding_keeps_its_padding_index_and_follows_a_cast():
    table = nn.Embedding(10, 16, padding_idx=3)
    layer = Int8Embedding.from_float(table)
    ids = torch.tensor([[3, 1], [9, 0]])
    assert layer.padding_idx == 3
    assert torch.equal(layer(ids)[0, 0], torch.zeros(16))
    assert relative(layer(ids), table(ids)) < 0.01
    layer.to(torch.bfloat16)
    assert layer(ids).dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float32
    with pytest.raises(IndexError):
        layer(torch.tensor([10]))


@needs_copy
def test_packed_copy_follows_every_change_of_the_weight():
    layer = Int8Linear.from_float(nn.Linear(16, 8))
    x = torch.randn(4, 16)
    with torch.no_grad():
        before = layer(x)
        layer.weight.neg_()
        assert relative(layer(x) - layer.bias, layer.bias - before) < 1e-5
        layer.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)
        torch.testing.assert_close(layer(x), layer.bias.expand(4, 8))
        other = Int8Linear.from_float(nn.Linear(16, 8))
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
    assert layer.derived_bytes() > 0
    assert copy.deepcopy(layer).derived_bytes() == 0
    assert set(layer.state_dict()) == {"weight", "scale", "bias"}


def test_backward_is_refused_by_name():
    layer = Int8Linear.from_float(nn.Linear(8, 8))
    y = layer(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(lc.CompressionError, match="Int8Linear has no backward pass"):
        y.sum().backward()


# -- the strategy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_close_in_every_family(family, activations):
    expected = logits(tiny_model(family))
    model = quantized(family, activations=activations)
    assert relative(logits(model), expected) < 0.08
    assert model.num_parameters() == tiny_model(family).num_parameters()
    assert footprint(model).parameters == footprint(tiny_model(family)).parameters
    if family != "opt":  # whose table of 2048 positions stays in float
        assert footprint(model).disk_bytes < 0.36 * footprint(tiny_model(family)).disk_bytes


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "opt"])
def test_a_tied_head_shares_one_int8_weight(family):
    model = quantized(family)
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(head, Int8Linear)
    assert head.weight is table.weight
    assert head.scale is table.scale
    expected = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), expected)
    twin = copy.deepcopy(model)
    assert twin.get_output_embeddings().scale is twin.get_input_embeddings().scale
    assert twin.get_output_embeddings().scale is not head.scale
    assert torch.equal(logits(twin), expected)


def test_a_head_of_a_masked_model_keeps_its_tied_bias():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForPreTraining(BertConfig(**sizes, intermediate_size=64)).eval()
    model = lc.DynamicQuantization().compress(model, lc.Context())
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert model.cls.predictions.decoder.bias is model.cls.predictions.bias


@pytest.mark.parametrize("architecture", ["xlm-roberta", "olmo"])
@pytest.mark.parametrize("bits", [8, 4])
def test_folders_whose_head_comes_first_or_without_a_float_weight(architecture, bits, tmp_path):
    more = {"*": 4}  # heads and embeddings, too
    step = lc.DynamicQuantization() if bits == 8 else lc.WeightOnlyQuantization(group_size=32, overrides=more)
    model = step.compress(build_tiny("causal-lm", architecture), lc.Context())
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def test_the_last_float_weight_stays_and_says_so():
    plan = lc.DynamicQuantization().plan(build_tiny("causal-lm", "olmo"), lc.Context())
    (left,) = [action for action in plan if action.path and not action.touched]
    assert "tells a model's dtype" in left.reason


def test_a_tied_head_follows_its_embedding_into_float():
    model = quantized(embeddings=False)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plan = lc.DynamicQuantization(embeddings=False).plan(tiny_model("llama"), lc.Context())
    reason = next(action.reason for action in plan if action.path == "lm_head")
    assert "shares its weight with model.embed_tokens" in reason
    assert type(quantized(skip=("lm_head",)).model.embed_tokens) is nn.Embedding


def test_plan_tells_what_is_done_and_changes_nothing():
    model = tiny_model("gemma")
    before = copy.deepcopy(model.state_dict())
    plan = {action.path: action for action in lc.DynamicQuantization().plan(model, lc.Context())}
    assert plan["model.layers.0.mlp.up_proj"].does == "int8 per channel, activations per token"
    assert "forward of its own" in plan["model.embed_tokens"].reason
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
    touched = {path for path, action in plan.items() if action.touched}
    done = {path for path, module in quantized("gemma").named_modules() if isinstance(module, QuantizedModule)}
    assert done == touched


def test_targets_and_skip():
    model = quantized(targets=("*.mlp.*",), skip=("*.down_proj",))
    found = {path for path, module in model.named_modules() if isinstance(module, QuantizedModule)}
    assert found == {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate_proj", "up_proj")}


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"bits": 4}, lc.ConfigError, "DynamicQuantization.bits must be 8, got 4"),
        ({"activations": "row"}, lc.ConfigError, "'tensor' or 'token'"),
        ({"targets": ("*.nothing",)}, lc.NothingToCompressError, "nothing"),
        (
            {"targets": ("lm_head",), "skip": ("*embed*",)},
            lc.NothingToCompressError,
            r"lm_head: shares its weight with model.embed_tokens, which stays in float: skip='*embed*'",
        ),
    ],
)
def test_bad_fields(fields, error, words):
    with pytest.raises(error, match=words.replace("*", r"\*")):
        quantized(**fields)


def test_bad_models_are_refused_unchanged():
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(lc.CompressionError, match=r"layers\.1\.mlp\.up_proj"):
        lc.DynamicQuantization().compress(model, lc.Context())
    assert not any(isinstance(module, QuantizedModule) for module in model.modules())
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        lc.DynamicQuantization().compress(quantized(), lc.Context())


def test_a_quantized_model_behaves_in_transformers():
    model = quantized(activations="token")
    assert model.dtype == torch.float32
    assert model.is_quantized
    settings = {**tiny_inputs(model), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    cached = model.generate(**settings, use_cache=True)
    assert cached.shape[1] == settings["input_ids"].shape[1] + 5
    assert torch.equal(model.generate(**settings, use_cache=False), cached)
    with pytest.raises(ValueError, match="not supported for quantized"):
        model.half()
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.model.embed_tokens.scale.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16


# -- the format ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_and_saved_again_bit_equal_and_read_in_a_fresh_process(family, reloads, tmp_path):
    for activations in ("tensor", "token") if family == "llama" else ("tensor",):
        model = quantized(family, activations=activations)
        expected = logits(model)
        model.save_pretrained(tmp_path / activations)
        again = type(model).from_pretrained(tmp_path / activations)
        assert torch.equal(logits(again), expected)
        again.save_pretrained(tmp_path / f"{activations}-again")
        assert torch.equal(logits(type(model).from_pretrained(tmp_path / f"{activations}-again")), expected)
        save_expected(model, tmp_path / activations)
        reloads.append(tmp_path / activations)


def test_the_method_is_registered_whichever_is_imported_first():
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    assert "llmcompress" in AUTO_QUANTIZER_MAPPING  # here conftest.py imported llmcompress first
    code = (
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\nassert 'llmcompress' not in "
        "AUTO_QUANTIZER_MAPPING\nimport llmcompress\nassert 'llmcompress' in AUTO_QUANTIZER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_base_model_reads_a_folder_with_a_head_and_saves_again(tmp_path):
    model = quantized("bert")
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    ids = tiny_inputs(model)
    with torch.no_grad():
        expected = model.bert(**ids).last_hidden_state
        assert torch.equal(base(**ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        assert torch.equal(AutoModel.from_pretrained(tmp_path / "base")(**ids).last_hidden_state, expected)


def test_half_precision_comes_back_bit_equal(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto")
    model = lc.DynamicQuantization().compress(model, lc.Context())
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype="auto")
    assert again.dtype == torch.bfloat16
    assert again.lm_head.scale.dtype == torch.float32
    assert torch.equal(logits(again), logits(model))


def edit_config(folder, change):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(format_version=99), "upgrade it with pip"),
        (lambda config: config["groups"][0].update(scheme="int1"), "must have a scheme"),
        (lambda config: config.pop("groups"), "list of groups"),
        (lambda config: config["groups"][1]["modules"].append("model.nowhere"), "model.nowhere"),
        (lambda config: config["groups"][1]["modules"].remove("model.layers.0.mlp.up_proj"), "holds codes"),
    ],
)
def test_a_damaged_or_newer_config_is_refused_by_plain_from_pretrained(tmp_path, change, words):
    quantized().save_pretrained(tmp_path)
    edit_config(tmp_path, change)
    with pytest.raises(lc.CheckpointError, match=words):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_missing_scale_is_refused(tmp_path):
    quantized().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lc.CheckpointError, match=r"layers\.1\.mlp\.up_proj\.scale"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_plan_tells_the_copies_that_products_make():
    model = tiny_model("llama")
    plan = lc.DynamicQuantization().plan(model, lc.Context())
    told = [action.reason for action in plan if "makes a copy of the codes" in (action.reason or "")]
    small = quantized("llama")
    before = footprint(small).memory_bytes
    small(**tiny_inputs(small))
    copied = footprint(small).memory_bytes - before
    assert len(told) == (1 if copied else 0)
    if copied:
        megabytes = float(re.search(r"([\d.e-]+) MB in all", told[0])[1])
        # Layers this small are filled up to the widths of the kernel, and have a scale for few columns.
        assert megabytes <= copied / 1e6 <= 1.5 * megabytes


@pytest.mark.parametrize(
    "layer", [Int8Linear.from_float(nn.Linear(4, 3)), Int8StaticLinear.calibrated(nn.Linear(4, 3), 0.01, 128)]
)
def test_an_input_of_whole_numbers_is_refused(layer):
    with torch.no_grad(), pytest.raises(lc.CompressionError, match=f"{type(layer).__name__} needs a float input, got"):
        layer(torch.ones(2, 4, dtype=torch.int8))
