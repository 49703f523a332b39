"""Static int8: the layer with a stored scale, the strategy on every family, smoothing, outliers, and the format."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.pytorch_utils import Conv1D

import llmcompress as lc
from llmcompress.anatomy.layers import weight_layers
from llmcompress.anatomy.scaling import scale_sites
from llmcompress.calibration import calibration_batches
from llmcompress.quantization import kernels, static
from llmcompress.quantization.choice import choose
from llmcompress.quantization.modules import Int8Embedding
from llmcompress.quantization.smoothing import InputMaxima, smooth, smoothing_scales
from llmcompress.quantization.static_modules import Int8StaticLinear
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


def context_of(model):
    return lc.Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)


def batch_of(model):
    return calibration_batches(model, context_of(model), who="test", samples=8, max_length=64)[0]


def quantized(model, context=None, **fields):
    return lc.StaticQuantization(**fields).compress(copy.deepcopy(model), context or context_of(model))


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def with_outlier_channels(family="llama"):
    """A model that computes what it did, with a few channels of its norms a hundred times larger."""
    model = tiny_model(family)
    with torch.no_grad():
        for block in model.model.layers:
            for norm, readers in (
                (block.input_layernorm, [getattr(block.self_attn, f"{name}_proj") for name in "qkv"]),
                (block.post_attention_layernorm, [block.mlp.gate_proj, block.mlp.up_proj]),
            ):
                norm.weight[:3] *= 100
                for linear in readers:
                    linear.weight[:, :3] /= 100
    return model


# -- the layer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fallback", [True, False])
def test_layer_takes_any_shape_and_float_dtype(fallback, monkeypatch):
    if fallback:
        monkeypatch.setattr(kernels, "takes_copy", lambda weight: False)
    linear = nn.Linear(48, 20)
    layer = Int8StaticLinear.calibrated(linear, 8 / 255, 128)
    with torch.no_grad():
        for shape in ((48,), (3, 48), (2, 3, 48), (0, 48), (2, 0, 48)):
            assert layer(torch.randn(shape)).shape == (*shape[:-1], 20)
        x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0)).clamp(-3.9, 3.9)
        assert relative(layer(x), linear(x)) < 0.03
        for dtype in (torch.bfloat16, torch.float16):
            assert layer(x.to(dtype)).dtype == dtype
            assert relative(layer(x.to(dtype)).float(), linear(x)) < 0.04
        assert torch.equal(layer(x), torch.cat([layer(row.unsqueeze(0)) for row in x]))
        conv = Conv1D(12, 8)
        x = torch.rand(2, 5, 8) * 2 - 1
        assert relative(Int8StaticLinear.calibrated(conv, 2 / 255, 128)(x), conv(x)) < 0.04


def test_fallback_gives_what_the_fastest_kernel_gives(monkeypatch):
    layer = Int8StaticLinear.calibrated(nn.Linear(96, 40), 0.03, 77)
    x = torch.randn(50, 96) * 5
    with torch.no_grad():
        fast = layer(x)
        monkeypatch.setattr(kernels, "takes_copy", lambda weight: False)
        torch.testing.assert_close(copy.deepcopy(layer)(x), fast, rtol=1e-6, atol=1e-5)


def test_layer_follows_its_scale_and_keeps_its_dtype():
    layer = Int8StaticLinear.calibrated(nn.Linear(16, 8), 0.01, 128)
    x = torch.randn(4, 16)
    with torch.no_grad():
        before = layer(x)
        layer.input_scale.mul_(2)
        changed = layer(x)
        assert not torch.equal(changed, before)
        other = Int8StaticLinear.calibrated(nn.Linear(16, 8), 0.5, 3)
        assert set(layer.state_dict()) == {"weight", "scale", "bias", "input_scale", "input_zero_point"}
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), other(x))
    layer.to(torch.bfloat16)
    assert layer.input_scale.dtype == layer.scale.dtype == torch.float32
    assert layer.input_zero_point.dtype == torch.int32
    assert "x / 0.5 + 3" in repr(layer)


def test_a_compiled_model_is_one_graph_and_gives_the_same():
    model = tiny_model("bert")
    batch = batch_of(model)
    model = quantized(model)
    expected = logits(model, batch)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(**batch).logits
    assert torch.equal(compiled, expected)


# -- the strategy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay_close_in_every_family(family):
    model = tiny_model(family)
    batch = batch_of(model)
    small = quantized(model, ranges="minmax")
    assert relative(logits(small, batch), logits(model, batch)) < 0.25
    assert any(isinstance(module, Int8StaticLinear) for module in small.modules())
    if small.get_output_embeddings() is not None and family in {"llama", "gpt2", "t5", "opt"}:
        assert small.get_output_embeddings().weight is small.get_input_embeddings().weight


@pytest.mark.parametrize(
    "fields",
    [{"ranges": "percentile"}, {"ranges": "mse"}, {"ranges": "entropy"}, {"ranges": "minmax", "symmetric": True}],
)
def test_every_way_to_choose_ranges_stays_close(fields):
    model = tiny_model("gpt2")
    batch = batch_of(model)
    assert relative(logits(quantized(model, **fields), batch), logits(model, batch)) < 0.15


def test_plan_is_what_is_done():
    model = tiny_model("t5")
    plan = {action.path: action for action in lc.StaticQuantization(skip=("*.wo",)).plan(model, context_of(model))}
    assert plan["encoder.block.0.layer.1.DenseReluDense.wi"].does == "int8 per channel, activations affine by mse"
    assert plan["encoder.block.0.layer.1.DenseReluDense.wo"].reason == "skip='*.wo'"
    small = quantized(model, skip=("*.wo",))
    done = {p for p, module in small.named_modules() if isinstance(module, (Int8StaticLinear, Int8Embedding))}
    assert done == {path for path, action in plan.items() if action.touched}


def test_activations_at_the_end_of_float32_are_refused():
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 1e38
    with pytest.raises(lc.CompressionError, match=r"activations of \S+ enter model\.layers\.0\.mlp\.down_proj"):
        quantized(model)


def test_layers_that_int8_harms_stay_in_float_and_are_told():
    model = with_outlier_channels()
    context = context_of(model)
    small = quantized(model, context, ranges="minmax", outliers=0.2)
    told = {action.path: action.reason for action in context.told}
    kept = {path for path, module in small.named_modules() if type(module) is nn.Linear}
    assert kept == set(told)
    assert "model.layers.0.mlp.up_proj" in kept
    assert "model.layers.0.self_attn.o_proj" not in kept
    for path in kept:
        assert "its int8 outputs are off by " in told[path]
        assert float(told[path].split("off by ")[1].split("%")[0]) > 20
    small = quantized(model, ranges="minmax", outliers=None)
    assert not any(type(module) is nn.Linear for module in small.modules())
    with pytest.raises(lc.NothingToCompressError, match="off by"):
        quantized(model, outliers=1e-6, embeddings=False, targets=("*.mlp.*",))


def test_a_tied_head_that_stays_takes_its_embedding_along(monkeypatch):
    model = tiny_model("llama")
    own = static._relative_error
    monkeypatch.setattr(
        static, "_relative_error", lambda layer, *given: 0.5 if layer.name == "lm_head" else own(layer, *given)
    )
    result = lc.compress(
        model, lc.StaticQuantization(), data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False
    )
    assert type(result.model.lm_head) is nn.Linear
    assert result.model.lm_head.weight is result.model.model.embed_tokens.weight
    left = {action.path: action.reason for action in result.report.steps[-1].left}
    assert left["lm_head"] == "its int8 outputs are off by 50.0%, above outliers=0.2"
    assert left["model.embed_tokens"] == f"shares its weight with lm_head, which stays in float: {left['lm_head']}"
    touched = {action.path for action in result.report.steps[-1].touched}
    assert touched.isdisjoint(left)
    assert "model.layers.0.mlp.up_proj" in touched


def test_a_layer_that_no_token_reaches_stays_in_float():
    model = tiny_model("bert")
    model.bert.never = nn.Linear(64, 64)
    context = context_of(model)
    small = quantized(model, context)
    assert type(small.bert.never) is nn.Linear
    assert {action.path: action.reason for action in context.told}["bert.never"] == "no calibration token reached it"


# -- smoothing ----------------------------------------------------------------------------------------------------


def test_smoothing_scales_as_computed_by_hand():
    model = tiny_model("llama")
    site = next(site for site in scale_sites(model) if site.source.endswith("layers.0.self_attn.v_proj"))
    layer = next(layer for layer in weight_layers(model) if layer.name == site.consumers[0])
    with torch.no_grad():
        layer.weight.fill_(0.25)
    seen = InputMaxima.of(layer)
    inputs = torch.ones(2, 64)
    inputs[0, 1] = -16.0  # of the first query head: channel 1
    inputs[1, 18] = 4.0  # of the second, which reads the same values: channel 2
    inputs[:, [3, 19]] = 0.0
    seen.update(inputs)
    scales = smoothing_scales(site, [(layer, seen)], 0.5)
    assert scales.shape == (32,)
    assert scales[:5].tolist() == [2.0, 8.0, 4.0, 1.0, 2.0]
    assert smoothing_scales(site, [(layer, seen)], 1.0)[:3].tolist() == [1.0, 16.0, 4.0]


@pytest.mark.parametrize("family", ["llama", "opt", "t5", "gemma"])
def test_smoothing_leaves_the_float_model_as_it_was(family):
    model = tiny_model(family)
    batch = batch_of(model)
    expected = logits(model, batch)
    layers, _ = choose(model, who="test", targets=None, skip=(), kinds=("linear", "conv1d"))
    told = smooth(model, [batch], layers, 0.5, who="test")
    assert relative(logits(model, batch), expected) < 1e-4
    assert sum(action.touched for action in told) == len(scale_sites(model))


def test_smoothing_makes_up_for_channels_with_outliers():
    model = with_outlier_channels()
    batch = batch_of(model)
    expected = logits(model, batch)
    assert relative(expected, logits(tiny_model("llama"), batch)) < 1e-4
    context = context_of(model)
    rough, even = (quantized(model, context, outliers=None, smooth=alpha) for alpha in (None, 0.5))
    errors = [relative(logits(each, batch), expected) for each in (rough, even)]
    assert errors[1] < 0.3 * errors[0]
    assert errors[1] < 0.2
    divided = [action.path for action in context.told if action.touched]
    assert "model.layers.0.input_layernorm" in divided


def test_dynamic_quantization_is_smoothed_too():
    model = with_outlier_channels()
    batch, context = batch_of(model), context_of(model)
    expected = logits(model, batch)
    rough, even = (
        relative(logits(lc.DynamicQuantization(smooth=alpha).compress(copy.deepcopy(model), context), batch), expected)
        for alpha in (None, 0.5)
    )
    assert even < 0.3 * rough
    assert lc.DynamicQuantization().needs == frozenset()
    assert not lc.DynamicQuantization(smooth=0.5).in_turns
    with pytest.raises(lc.MissingInputError, match="DynamicQuantization needs data"):
        lc.compress(model, lc.DynamicQuantization(smooth=0.5), progress=False)


def test_what_cannot_be_smoothed_is_told():
    model = tiny_model("bert")
    context = context_of(model)
    quantized(model, context, smooth=0.5)
    remark = next(action.reason for action in context.told if action.path == "")
    assert "bert.encoder.layer.0.attention.self.query" in remark
    assert "inputs not smoothed" in remark


# -- what is refused, and the format ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"percentile": 101}, r"StaticQuantization.percentile must be in \(50, 100\], got 101"),
        ({"percentile": 50}, r"StaticQuantization.percentile must be in \(50, 100\], got 50"),
        ({"smooth": 1.5}, r"StaticQuantization.smooth must be in \[0, 1\], got 1.5"),
        ({"outliers": 0}, r"StaticQuantization.outliers must be in \(0, inf\), got 0"),
        ({"bits": 4}, r"StaticQuantization.bits must be 8, got 4"),
        ({"ranges": "max"}, r"'minmax', 'percentile', 'mse' or 'entropy'"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(lc.ConfigError, match=words):
        lc.StaticQuantization(**fields)


def test_bad_models_and_data_are_refused():
    model = tiny_model("llama")
    context = lc.Context(data=[lc.Example("")] * 4, tokenizer=tiny_tokenizer(), progress=False)
    with pytest.raises(lc.MissingInputError, match="too short"):
        quantized(model, context)
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        lc.StaticQuantization().compress(quantized(model), context_of(model))
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[7] = torch.nan
    with pytest.raises(lc.CompressionError, match=r"activations enter model\.layers\.1\.mlp\.gate_proj"):
        quantized(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(lc.CompressionError, match=r"layers\.0\.mlp\.up_proj hold NaN"):
        quantized(model)


def test_half_precision_comes_back_bit_equal(tmp_path):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype="auto")
    model = quantized(model, context_of(model), smooth=0.5)
    model.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype="auto")
    batch = tiny_inputs(model)
    assert again.dtype == torch.bfloat16
    assert again.lm_head.input_scale.dtype == torch.float32
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.assets
@pytest.mark.skipif(not (ASSETS / "stories260K-hf").is_dir(), reason="stories260K-hf is not there")
def test_a_trained_model_keeps_its_loss():
    folder = ASSETS / "stories260K-hf"
    text = next((ASSETS / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer(text[:12000], return_tensors="pt").input_ids[0][:2048].view(8, 256)[:4]
    data = [lc.Example(text[start : start + 1200]) for start in range(400_000, 409_600, 1200)]
    context = lc.Context(data=data, tokenizer=tokenizer, progress=False)
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
        losses = {
            alpha: quantized(model, context, smooth=alpha, max_length=128)(input_ids=ids, labels=ids).loss.item()
            for alpha in (None, 0.5)
        }
    assert all(loss < 1.03 * expected for loss in losses.values()), (expected, losses)
