"""What stands between the products of a quantized model: the native functions, and the modules that call them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import llmcompress as lc
from llmcompress.anatomy.probe import probe_inputs, probe_outputs
from llmcompress.quantization import between
from llmcompress.quantization.between import Activation, Between, LayerNorm, RMSNorm, use_native
from llmcompress.quantization.kernels import native
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import tiny_model
from native_sets import HERE, built

every_set = pytest.mark.parametrize("kernels", HERE, ids=lambda kernels: kernels.name)
EXACT = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "silu": F.silu}
SWAPPED = {
    "bert": {("Activation", "GELUActivation"), ("LayerNorm", "LayerNorm")},
    "gpt2": {("Activation", "NewGELUActivation"), ("LayerNorm", "LayerNorm")},
    "llama": {("Activation", "SiLUActivation"), ("RMSNorm", "LlamaRMSNorm")},
    "gemma": {("Activation", "GELUTanh"), ("RMSNorm", "GemmaRMSNorm")},
}


@built
@every_set
@pytest.mark.parametrize("gate", EXACT)
def test_activation_functions_are_the_exact_ones_to_rounding(kernels, gate):
    x = torch.cat(
        [torch.linspace(-12, 12, 40001), torch.tensor([0.0, -0.0, 1e-30, -1e-30, -1e30, 1e30, 2e38, -2e38, -1000.0])]
    )
    error = (native.activate(gate, x, kernels).double() - EXACT[gate](x.double())).abs()
    assert (error / (1 + x.double().abs())).max() < 1e-6
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    assert torch.equal(native.activate(gate, odd, kernels).isnan(), EXACT[gate](odd.double()).isnan())


@built
@every_set
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(0, 4), columns=st.integers(1, 90), exponent=st.integers(-12, 12), seed=st.integers(0, 99))
def test_rms_norm_is_the_formula(kernels, rows, columns, exponent, seed):
    source = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(rows, columns, generator=source) * 10.0**exponent, torch.randn(columns, generator=source)
    exact = x.double()
    exact = exact * (exact.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert torch.allclose(native.rms_norm(x, weight, 1e-6, kernels).double(), exact, rtol=2e-6, atol=1e-12)
    moved = native.rms_norm(x, weight - 1, 1e-6, kernels, offset=1.0).double()
    assert torch.allclose(moved, exact, rtol=2e-6, atol=1e-6 * float(exact.abs().max() if exact.numel() else 0))


@built
@every_set
@settings(deadline=None, max_examples=40)
@given(rows=st.integers(1, 4), columns=st.integers(1, 150), offset=st.integers(-3, 3), seed=st.integers(0, 99))
def test_layer_norm_is_the_formula(kernels, rows, columns, offset, seed):
    source = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(size, generator=source) for size in ((rows, columns), (columns,), (columns,)))
    x += offset
    exact = F.layer_norm(x.double(), (columns,), weight.double(), bias.double(), 1e-5)
    found = native.layer_norm(x, weight, bias, 1e-5, kernels).double()
    assert torch.allclose(found, exact, rtol=1e-5, atol=1e-4 if columns < 3 else 1e-5)


@built
@every_set
def test_layer_norm_of_what_is_not_finite_is_nan_in_its_row_alone(kernels):
    x = torch.randn(3, 40)
    x[1, 7] = float("inf")
    y = native.layer_norm(x, torch.ones(40), torch.zeros(40), 1e-5, kernels)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


@built
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_nothing(threads):
    before, x = torch.get_num_threads(), torch.randn(3, 99, 301)
    weight = torch.rand(301)
    alone = [native.activate("gelu", x[i], HERE[0]) for i in range(3)]
    try:
        torch.set_num_threads(threads)
        assert torch.equal(native.activate("gelu", x, HERE[0]), torch.stack(alone))
        normed = native.rms_norm(x, weight, 1e-5, HERE[0])
        centred = native.layer_norm(x, weight, weight, 1e-5, HERE[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(centred[1, 5:6], native.layer_norm(x[1, 5:6].contiguous(), weight, weight, 1e-5, HERE[0]))
    assert torch.equal(normed[1, 5:6], native.rms_norm(x[1, 5:6].contiguous(), weight, 1e-5, HERE[0]))


@built
@pytest.mark.parametrize("family", SWAPPED)
def test_a_quantized_model_has_them_and_nothing_of_them_is_saved(family, tmp_path, monkeypatch):
    model = tiny_model(family)
    small = lc.DynamicQuantization().compress(copy.deepcopy(model), lc.Context())
    swapped = {
        (type(m).__name__, type(m.plain).__name__): m.plain.training for m in small.modules() if isinstance(m, Between)
    }
    assert set(swapped) == SWAPPED[family]
    assert not any(swapped.values())
    small.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    with torch.no_grad():
        logits = small(**inputs).logits
        assert torch.equal(again(**inputs).logits, logits)
        assert torch.equal(copy.deepcopy(small)(**inputs).logits, logits)
    monkeypatch.setattr(between, "native", lambda: None)
    plain = type(model).from_pretrained(tmp_path)
    assert not any(isinstance(module, Between) for module in plain.modules())
    assert list(plain.state_dict()) == list(small.state_dict())
    with torch.no_grad():
        # A step of a code at the most.
        assert (plain(**inputs).logits - logits).norm() < 0.02 * logits.norm()
    floats = lc.dequantize(small)
    assert [type(module) for module in floats.modules()] == [type(module) for module in model.modules()]


@built
def test_the_plain_module_runs_where_the_native_one_cannot():
    model = nn.Sequential(nn.RMSNorm(16, eps=1e-5), nn.GELU(), nn.Tanh()).requires_grad_(False)
    plain = copy.deepcopy(model)
    model[1].register_forward_hook(lambda module, given, output: output)
    use_native(model)
    assert [type(module) for module in model] == [RMSNorm, nn.GELU, nn.Tanh]
    model[1]._forward_hooks.clear()
    use_native(model)
    assert [type(module) for module in model] == [RMSNorm, Activation, nn.Tanh]
    assert isinstance(model[0].plain, nn.RMSNorm)
    x = torch.randn(4, 16)
    for other in (x.half(), x.double(), x[:0]):
        assert torch.equal(model(other), plain(other))
    strided = torch.randn(16, 4).T
    assert torch.allclose(model(strided), plain(strided), atol=1e-6)
    x.requires_grad_()
    assert torch.equal(torch.autograd.grad(model(x).sum(), x)[0], torch.autograd.grad(plain(x).sum(), x)[0])
    # A weight that is replaced or cast counts at once, on both ways.
    model[0].weight = nn.Parameter(torch.full((16,), 2.0), requires_grad=False)
    plain[0].weight = nn.Parameter(torch.full((16,), 2.0), requires_grad=False)
    assert torch.allclose(model(x.detach()), plain(x.detach()), atol=1e-6)
    assert torch.equal(model.half()(x.half()), plain.half()(x.half()))


@built
def test_a_layer_norm_is_native_and_knows_new_tensors():
    model = nn.Sequential(nn.LayerNorm(16, eps=1e-3)).requires_grad_(False)
    plain = copy.deepcopy(model)
    use_native(model)
    assert isinstance(model[0], LayerNorm)
    assert list(model.state_dict()) == list(plain.state_dict())
    x = torch.randn(3, 4, 16) * 0.01
    for one in (model, plain):
        one[0].bias = nn.Parameter(torch.full((16,), 2.0), requires_grad=False)
    assert torch.allclose(model(x), plain(x), atol=1e-5)
    assert torch.equal(model(x[:0]), plain(x[:0]))
    assert torch.equal(model.half()(x.half()), plain.half()(x.half()))


@built
def test_norms_without_a_bias_or_over_more_than_one_axis_stay():
    model = nn.Sequential(nn.LayerNorm(8, bias=False), nn.LayerNorm((4, 8)), nn.LayerNorm(8, elementwise_affine=False))
    use_native(model)
    assert all(type(module) is nn.LayerNorm for module in model)


class Gated(nn.Module):
    """The norm of Mamba-like blocks: with a gate another function, and some of them cannot do without."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.gate = nn.Parameter(torch.ones(8)), 1e-6, gate

    def forward(self, x, gate=None):
        if self.gate == "raises":
            raise ValueError("not enough values to unpack (expected 4, got 2)")
        normed = F.rms_norm(x, (8,), self.weight, 1e-6)
        return normed if self.gate == "optional" and gate is None else normed * F.silu(gate)


class Plain(Gated):
    def forward(self, x):
        return super().forward(x)


@built
@pytest.mark.parametrize(
    "norm", [Gated("optional"), Gated("needed"), Gated("raises"), Plain("needed"), Plain("raises")]
)
def test_a_norm_that_takes_a_gate_or_cannot_be_tried_is_left_alone(norm):
    model = nn.Sequential(norm)
    use_native(model)
    assert model[0] is norm


@built
def test_a_norm_of_one_tensor_is_taken():
    model = nn.Sequential(Plain("optional"))
    use_native(model)
    assert isinstance(model[0], RMSNorm)


@pytest.mark.parametrize("family", ["qwen3_next", "zamba2"])
def test_families_with_gated_norms_are_quantized_and_run(family):
    model = lc.DynamicQuantization().compress(build_tiny("causal-lm", family), lc.Context())
    with torch.no_grad():
        assert torch.isfinite(probe_outputs(model, probe_inputs(model))).all()
