"""Experts in codes: the model's own forward over them, the products, the folder, the sizes."""

import copy
import json
import pickle
from fnmatch import fnmatchcase

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import llmcompress as lc
from llmcompress.anatomy.footprint import footprint
from llmcompress.anatomy.layers import weight_layers
from llmcompress.evaluation.flops import count_flops
from llmcompress.quantization import kernels
from llmcompress.quantization.expert_modules import Int8Experts, QuantizedExperts
from llmcompress.quantization.expert_weight import ExpertWeight
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Grid, decode
from llmcompress.quantization.packed_experts import PackedExperts
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import save_expected, tiny_inputs, tiny_model

# How the experts of each are used: plain, transposed with biases, all at once, one weight a module, without a gate.
_ARCHITECTURES = ["mixtral", "gpt_oss", "llama4", "jetmoe", "longcat_flash", "nemotron_h", "inkling_text"]


class Stack(nn.Module):
    """Two weights of three experts, one the other way round."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.up = nn.Parameter(torch.randn(3, 20, 32, generator=generator))
        self.bias = nn.Parameter(torch.randn(3, 20, generator=generator))
        self.limit = 7.0

    def forward(self, x):
        return F.linear(x, self.up[1]).clamp(max=self.limit) + self.bias[1]


def coded(transposed=False, activations="token"):
    module = Stack()
    if transposed:
        module.up = nn.Parameter(module.up.detach().mT.contiguous())
    return module, Int8Experts.from_float(module, ["up"], transposed=transposed, activations=activations)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


@pytest.fixture
def nothing_is_dequantized(monkeypatch):
    def fail(self):
        raise AssertionError(f"{self} was dequantized")

    monkeypatch.setattr(ExpertWeight, "dequantized", fail)


# -- the weight that stands for one -------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_dequantized")
@pytest.mark.parametrize("activations", ["tensor", "token"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,), ()])
def test_products_are_computed_from_the_codes(rows, activations):
    x = torch.randn(*rows, 32, generator=torch.Generator().manual_seed(1))
    bias = torch.ones(20)
    with torch.no_grad():
        float_module, plain = coded(activations=activations)
        turned = coded(transposed=True, activations=activations)[1]
        expected = x @ float_module.up[2].T
        for found in (
            F.linear(x, plain.up[2]),
            F.linear(x, plain.up[torch.tensor(-1)], bias) - bias,
            x @ plain.up[2].T,
            torch.matmul(x, plain.up.mT[2]),
            x.matmul(turned.up[2]),
            F.linear(x, weight=turned.up.transpose(1, 2)[2]),
        ):
            assert found.shape == expected.shape
            assert found.numel() == 0 or relative(found, expected) < 0.02
        assert plain(x).shape == expected.shape


@pytest.mark.usefixtures("nothing_is_dequantized")
def test_all_experts_at_once_are_computed_one_by_one():
    x = torch.randn(3, 4, 32)
    float_module, plain = coded()
    with torch.no_grad():
        assert relative(torch.bmm(x, plain.up.transpose(1, 2)), torch.bmm(x, float_module.up.mT)) < 0.02


def test_whatever_else_is_done_gets_the_float_weight():
    float_module, plain = coded()
    with torch.no_grad():
        assert plain.up.shape == (3, 20, 32)
        assert (len(plain.up), plain.up.ndim, plain.up.size(1), plain.up.dtype) == (3, 3, 20, torch.float32)
        for found, expected in (
            (plain.up[torch.tensor([2, 0])], float_module.up[[2, 0]]),
            (plain.up[1:], float_module.up[1:]),
            (plain.up.sum(0), float_module.up.sum(0)),
            (torch.einsum("eoi,ti->eto", plain.up, torch.eye(32)), float_module.up.mT),
            (torch.cat([plain.up[0], plain.up[1]]), torch.cat([float_module.up[0], float_module.up[1]])),
            (plain.up.T, float_module.up.permute(2, 1, 0)),
            (plain.up.contiguous(), float_module.up),
        ):
            assert relative(found, expected) < 0.01
    with pytest.raises(IndexError):
        plain.up[3]


def test_experts_follow_a_cast_and_a_change_of_their_codes():
    float_module, plain = coded()
    x = torch.randn(4, 32)
    with torch.no_grad():
        before = plain(x)
        assert plain.derived_bytes() >= 0
        plain.up_codes.neg_()
        assert relative(F.linear(x, plain.up[1]), -F.linear(x, float_module.up[1])) < 0.02
        plain.up_codes.neg_()
        for again in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
            assert torch.equal(again(x), before)
            assert isinstance(again, Stack)
            assert again.up_codes is not plain.up_codes
        plain.to(torch.bfloat16)
        assert (plain.up.dtype, plain.up_scale.dtype) == (torch.bfloat16, torch.float32)
        assert plain(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(lc.CompressionError, match="Int8Stack has no backward pass"):
        plain(torch.randn(4, 32, requires_grad=True)).sum().backward()


def test_packed_experts_compute_from_their_codes(nothing_is_dequantized):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    for transposed in (False, True):
        for grid in (Grid(4, 16), Grid(3, None, symmetric=True), Grid(4, 8, codebook="nf4")):
            module = Stack()
            upright = module.up.detach()
            expected = quantize(upright.flatten(0, 1), grid)
            if transposed:
                module.up = nn.Parameter(upright.mT.contiguous())
            packed = PackedExperts.from_coded(module, {"up": (expected, grid)}, transposed=transposed, compute="float")
            whole = decode(expected, grid).unflatten(0, (3, 20))
            assert torch.equal(packed.float_weights()["up"], whole.mT if transposed else whole)
            with torch.no_grad():
                product = x @ packed.up[2] if transposed else F.linear(x, packed.up[2])
                torch.testing.assert_close(product, x @ whole[2].T)
                packed.compute = "int8"
                packed.to(torch.float32)
                assert relative(x @ (packed.up[2] if transposed else packed.up[2].T), x @ whole[2].T) < 0.03
            copied = kernels.takes_packed_copy(torch.device("cpu"), "int8")
            assert packed.derived_bytes() > 0 if copied else packed.derived_bytes() == 0
            assert copy.deepcopy(packed).derived_bytes() == 0
            assert packed.coded_weights()[0][1] == 3 * 20 * 32
            if grid.has_zero:
                with torch.no_grad():
                    before = packed.product("up", 2, x)
                    packed.up_zero = torch.zeros_like(packed.up_zero)
                    assert not torch.allclose(packed.product("up", 2, x), before)


# -- whole models -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("nothing_is_dequantized")
@pytest.mark.parametrize("architecture", _ARCHITECTURES)
def test_the_models_own_forward_runs_on_codes(architecture):
    model = build_tiny("causal-lm", architecture)
    int8 = lc.DynamicQuantization(activations="token").compress(copy.deepcopy(model), lc.Context())
    pairs = [
        (dict(model.named_modules())[path], m) for path, m in int8.named_modules() if isinstance(m, QuantizedExperts)
    ]
    assert pairs
    calls = {}
    hooks = [
        pair[0].register_forward_hook(lambda m, *call: calls.update({m: call}), with_kwargs=True) for pair in pairs
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    for module, experts in pairs:
        args, kwargs, expected = calls[module]
        with torch.no_grad():
            assert relative(experts(*args, **kwargs), expected) < 0.08
        assert isinstance(experts, type(module))
    assert footprint(int8).parameters == footprint(model).parameters
    assert footprint(int8).disk_bytes < 0.36 * footprint(model).disk_bytes


@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "jetmoe"])
def test_experts_are_packed_with_other_bits_by_pattern(architecture, tmp_path):
    model = build_tiny("causal-lm", architecture)
    down = "*.output_linear.weight" if architecture == "jetmoe" else "*.down_proj"
    step = lc.WeightOnlyQuantization(bits=4, group_size=32, overrides={down: 8}, compute="float")
    dense = {layer.name: layer for layer in weight_layers(model) if layer.kind == "experts"}
    result = lc.compress(model, step, progress=False)
    packed = result.model
    done = {action.path: action.does for action in result.report.steps[0].touched}
    for name, layer in dense.items():
        experts = packed.get_submodule(layer.path)
        bits = 8 if fnmatchcase(name, down) else 4
        assert f"int{bits}" in done[name]
        grid = experts.grids[layer.parameter]
        assert (grid.bits, grid.group_size) == (bits, 32)
        upright = layer.weight.detach().mT if layer.input_axis == 1 else layer.weight.detach()
        expected = decode(quantize(upright.flatten(0, 1), grid), grid).unflatten(0, upright.shape[:2])
        found = experts.float_weights()[layer.parameter]
        assert torch.equal(found.mT if layer.input_axis == 1 else found, expected)
    assert footprint(packed).parameters == footprint(model).parameters
    packed.save_pretrained(tmp_path)
    written = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert written == result.report.steps[0].footprint.disk_bytes
    again = type(packed).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(packed))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(packed).from_pretrained(tmp_path / "again")), logits(packed))


def test_layers_that_are_read_stay_in_float_in_4_bits_too():
    plan = lc.WeightOnlyQuantization(group_size=16).plan(build_tiny("causal-lm", "mamba"), lc.Context())
    reasons = {action.path: action.reason for action in plan}
    assert "instead of calling it" in reasons["backbone.layers.0.mixer.dt_proj"]


def test_operations_are_those_of_the_float_model():
    model = tiny_model("mixtral")
    int8 = lc.DynamicQuantization().compress(copy.deepcopy(model), lc.Context())
    assert count_flops(int8, tokens=8).count == count_flops(model, tokens=8).count


def test_one_weight_of_two_and_cut_experts(tmp_path):
    model = tiny_model("mixtral")
    cut = lc.compress(
        model, [lc.StructuredPruning(experts=0.25, ffn=0.5), lc.DynamicQuantization()], progress=False
    ).model
    experts = cut.model.layers[0].mlp.experts
    assert experts.float_shapes() == {"gate_up_proj": (3, 128, 64), "down_proj": (3, 64, 64)}
    cut.save_pretrained(tmp_path)
    assert torch.equal(logits(type(cut).from_pretrained(tmp_path)), logits(cut))
    half = lc.DynamicQuantization(targets=("*.down_proj",)).compress(model, lc.Context())
    experts = half.model.layers[0].mlp.experts
    assert isinstance(experts.gate_up_proj, nn.Parameter)
    assert list(experts.float_shapes()) == ["down_proj"]
    assert torch.isfinite(logits(half)).all()


def test_a_bad_expert_is_named():
    model = tiny_model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    with pytest.raises(lc.CompressionError, match=r"layers\.1\.mlp\.experts\.down_proj"):
        lc.DynamicQuantization().compress(model, lc.Context())


# One tensor an expert in a plain folder; transposed with biases; another name of the weight.
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "jetmoe"])
def test_the_folder_is_read_and_saved_again_bit_equal_and_read_in_a_fresh_process(architecture, reloads, tmp_path):
    model = build_tiny("causal-lm", architecture)
    if architecture == "mixtral":
        model.to(torch.bfloat16).save_pretrained(tmp_path / "float")
        model = type(model).from_pretrained(tmp_path / "float")
    model = lc.DynamicQuantization().compress(model, lc.Context())
    folder = tmp_path / architecture
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder)
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "again")), logits(model))
    save_expected(model, folder)
    reloads.append(folder)


@pytest.mark.parametrize("step", [lc.DynamicQuantization(), lc.WeightOnlyQuantization()])
def test_experts_in_codes_are_stored_as_the_model_has_them(step, tmp_path):
    # Of transformers' versions, some store each expert by itself, by a pattern that codes match too.
    model = step.compress(tiny_model("mixtral"), lc.Context())
    own = {key for key in model.state_dict() if ".experts." in key}
    for folder in ("once", "twice"):
        names = [pattern for one in model._weight_conversions for pattern in one.target_patterns]
        assert not any("experts" in name for name in names)
        model.save_pretrained(tmp_path / folder)
        written = load_file(tmp_path / folder / "model.safetensors")
        assert {key.replace("block_sparse_moe", "mlp") for key in written if ".experts." in key} == own
        model = lc.load(tmp_path / folder)
    # Of a float model the experts are stored as ever.
    lc.dequantize(model).save_pretrained(tmp_path / "float")
    assert any(".experts.0.w1" in key for key in load_file(tmp_path / "float" / "model.safetensors"))


def test_whoever_asks_for_a_missing_weight_is_told(tmp_path):
    model = lc.DynamicQuantization().compress(tiny_model("mixtral"), lc.Context())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("layers.1.block_sparse_moe.experts.down_proj_scale"))]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(lc.CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj_scale"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_that_names_another_weight_is_refused(tmp_path):
    model = lc.DynamicQuantization().compress(tiny_model("mixtral"), lc.Context())
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    group = next(g for g in content["quantization_config"]["groups"] if g["scheme"] == "int8_experts")
    assert group["parameters"] == ["gate_up_proj", "down_proj"]
    group["parameters"] = ["nothing"]
    path.write_text(json.dumps(content))
    with pytest.raises(lc.CheckpointError, match="'nothing' of MixtralExperts"):
        type(model).from_pretrained(tmp_path)
