"""Kernels of quantized layers: each against the reference, under torch.compile, and the table that tells which runs."""

import copy
import pickle

import pytest
import torch
from torch import nn

import llmcompress as lc
from llmcompress.quantization import kernels
from llmcompress.quantization.affine import quantize_rows
from llmcompress.quantization.between import use_plain
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Grid, decode
from llmcompress.quantization.kernels import dispatch, int4pack, int8, packing
from llmcompress.quantization.kernels.native import activate, native, packed_product, rms_norm
from llmcompress.quantization.modules import Int8Linear
from llmcompress.quantization.packed_modules import PackedLinear
from llmcompress.quantization.static_modules import Int8StaticLinear
from llmcompress.testing import tiny_inputs, tiny_model

COPIES = kernels.takes_copy(torch.empty(8, 8))
WAYS = ["tensor", "token", "stored"]


def one_block():
    """A Llama of one block: tracing takes as long for each further one, and shows the same."""
    model = tiny_model("llama")
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    return model


def case(way, shape=(5, 96), outputs=40, *, bias=True):
    generator = torch.Generator().manual_seed(0)
    weight, scale = quantize_rows(torch.randn(outputs, shape[-1], generator=generator))
    added = torch.randn(outputs, generator=generator) if bias else None
    x = torch.randn(shape, generator=generator) * 3 + 0.5
    return x, weight, scale, added, kernels.Stored.of(0.05, 100) if way == "stored" else way


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 96), (5, 96), (2, 3, 96), (0, 96)])
def test_int_mm_gives_what_the_reference_gives(way, bias, shape):
    given = case(way, shape, bias=bias)
    torch.testing.assert_close(kernels.int_mm_linear(*given), kernels.torch_linear(*given), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not kernels.has_fbgemm(torch.device("cpu")), reason="this torch has no fbgemm")
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("bias", [True, False])
def test_a_stored_scale_gives_the_very_codes_of_fbgemm(bits, bias, monkeypatch):
    if bits == 8 and int8.activation_bits() == 7:
        pytest.skip("8-bit products overflow on a CPU without VNNI")
    monkeypatch.setattr(int8, "activation_bits", lambda: bits)
    # A range that the inputs leave on both sides.
    x, weight, scale, added, stored = case("stored", (64, 96), bias=bias)
    assert stored.levels == 2**bits - 1
    fast = kernels.fbgemm_linear(x, kernels.pack(weight, scale, added, stored), added, stored)
    torch.testing.assert_close(fast, kernels.torch_linear(x, weight, scale, added, stored), rtol=1e-6, atol=1e-5)
    assert x.max() > (stored.levels - stored.zero_point) * stored.scale
    assert x.min() < -stored.zero_point * stored.scale


def test_stored_codes_as_computed_by_hand(monkeypatch):
    monkeypatch.setattr(int8, "activation_bits", lambda: 8)
    stored = kernels.Stored.of(0.5, 10)
    x = torch.tensor([[-100.0, -1.0, 0.0, 0.6, 0.25, 0.75, 1000.0]])  # 0.25 / 0.5 + 10 lies on the border: to even
    codes, zero, unit = int8._code(x, stored)
    assert codes.tolist() == [[0, 8, 10, 11, 10, 12, 255]]
    assert (zero, unit) == (10, 0.5)


@pytest.mark.parametrize(("activations", "backend", "grad"), [("tensor", "aot_eager", True), ("token", "eager", False)])
def test_a_compiled_model_is_one_graph_and_gives_the_same(grad, backend, activations, monkeypatch):
    packed = []
    monkeypatch.setattr(packing, "make_copy", lambda *tensors, own=packing.make_copy: packed.append(1) or own(*tensors))
    model = lc.DynamicQuantization(activations=activations).compress(one_block(), lc.Context())
    inputs = {**tiny_inputs(model), "use_cache": False}
    # A compiler gets the model's own norms and activation functions, to fuse with what is around them.
    eager = copy.deepcopy(model)
    use_plain(eager)
    with torch.no_grad():
        expected = eager(**inputs).logits
    packed.clear()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert torch.equal(compiled(**inputs).logits.detach(), expected)
    if COPIES:
        # Once a layer, and the eager model goes on with the same copies.
        layers = sum(isinstance(module, Int8Linear) for module in model.modules())
        assert len(packed) == layers
        with torch.no_grad():
            model(**inputs)
        assert len(packed) == layers


def test_a_compiled_backward_pass_is_refused_when_it_runs():
    layer = Int8Linear.from_float(nn.Linear(8, 8))
    torch._dynamo.reset()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 8, requires_grad=True))
    with pytest.raises(lc.CompressionError, match="Int8Linear has no backward pass"):
        y.sum().backward()


@pytest.mark.parametrize("operator", [kernels.int8_linear, kernels.int8_static_linear])
def test_fake_kernels_agree_with_real_ones(operator):
    x, weight, scale, bias, _ = case("tensor")
    given = ("token",) if operator is kernels.int8_linear else (torch.tensor(0.05), torch.tensor(9))
    for example in (x, x[0], x.bfloat16()):
        torch.library.opcheck(operator, (example, weight, scale, bias, *given))


def test_the_copy_dies_with_its_weight():
    layer = Int8Linear.from_float(nn.Linear(16, 8))
    before = len(packing._COPIES)
    with torch.no_grad():
        layer(torch.randn(2, 16))
    assert len(packing._COPIES) == before + COPIES
    layer.to(torch.float32)
    assert layer.derived_bytes() == 0
    assert len(packing._COPIES) == before


def test_a_copy_is_not_taken_for_that_of_a_weight_whose_address_came_free():
    """Replaced twice between two products, a weight often lies where the first one did."""
    layer, x = Int8Linear.from_float(nn.Linear(256, 256, bias=False)), torch.randn(3, 256)
    with torch.no_grad():
        layer(x)
        for _ in range(30):
            for _ in range(2):
                layer.fill(torch.randn(256, 256))
            expected = x @ layer.dequantized().T
            assert ((layer(x) - expected).norm() / expected.norm()).item() < 0.1


def test_marks_of_a_tensor_that_is_gone_are_those_of_no_other():
    weight = torch.zeros(4)
    known = packing.marks(weight)
    assert known == packing.marks(weight)
    assert known != packing.marks(weight.view(4))  # told apart without comparing what they hold
    weight.add_(1)
    assert known != packing.marks(weight)
    seen = []
    for _ in range(20):
        tensor = torch.zeros(4)
        assert packing.marks(tensor) not in seen
        seen.append(packing.marks(tensor))
        del tensor


def test_a_static_layer_is_pickled_after_a_product():
    layer, x = Int8StaticLinear.calibrated(nn.Linear(8, 8), scale=0.01, zero_point=128), torch.randn(2, 8)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_holds_the_product_and_not_the_memory_of_one_answer():
    """Kernels outside of torch are not recorded: what they wrote was taken for the value of an empty tensor."""

    class Logits(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    coded = Logits(lc.DynamicQuantization().compress(one_block(), lc.Context()).eval())
    packed = lc.WeightOnlyQuantization().compress(one_block(), lc.Context()).eval()
    first, second = torch.randint(4, 100, (2, 2, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        coded(first)  # with copies and without
        traced = torch.jit.trace(coded, first, check_trace=False)
        torch.testing.assert_close(traced(second), coded(second), rtol=1e-4, atol=1e-5)
        if COPIES:
            assert coded.model.model.layers[0].mlp.up_proj.derived_bytes() > 0
        if native() is not None:
            with pytest.raises(lc.CompressionError, match=r"cannot be recorded by torch\.jit\.trace"):
                torch.jit.trace(Logits(packed), first, check_trace=False)


@pytest.mark.skipif(native() is None, reason="no native kernels")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("gate", ["gelu", "gelu_tanh", "silu"])
def test_a_trace_holds_what_is_between_the_products(gate):
    weight, (first, second) = torch.randn(8), torch.randn(2, 3, 8)

    def between(x):
        return activate(gate, rms_norm(x, weight, 1e-6, native()), native())

    traced = torch.jit.trace(between, first, check_trace=False)
    torch.testing.assert_close(traced(second), between(second))


def test_the_default_device_is_not_that_of_what_a_kernel_reads(monkeypatch):
    linear, grid = nn.Linear(64, 32), Grid(4, 32, codebook="nf4")
    layer, x = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid), torch.randn(3, 64)
    weight, scale = quantize_rows(linear.weight)
    monkeypatch.setattr(packed_product, "_codebook", packed_product._codebook.__wrapped__)
    with torch.no_grad(), torch.device("meta"):
        found = layer(x)
        if kernels.has_fbgemm(torch.device("cpu")):
            kernels.pack(weight, scale, None, "token")
    expected = x @ layer.dequantized().T + linear.bias
    assert ((found - expected).norm() / expected.norm()).item() < 0.05


def test_the_table_tells_what_runs_here(monkeypatch):
    table = lc.kernels()
    for scheme in ("int8_linear", "int8_static_linear", "int8_experts"):
        assert table.used(scheme)[0].startswith(("native", "fbgemm")) == COPIES
        assert table.used(scheme, "cuda") == ([] if not torch.cuda.is_available() else table.used(scheme, "cuda"))
    text = str(table)
    assert "VNNI" in text
    assert "threads: " in text
    assert "absent: needs a CUDA device" in text or torch.cuda.is_available()
    assert table._repr_html_().count("<tr>") == len(table.choices) + 1
    without = [
        dispatch.Kernel("int8_linear", "cpu", "any", "first", lambda device: False, "luck"),
        dispatch.Kernel("int8_linear", "cpu", "any", "second", lambda device: True, "nothing"),
        dispatch.Kernel("int8_linear", "cpu", "any", "third", lambda device: True, "nothing"),
    ]
    monkeypatch.setattr(dispatch, "TABLE", without)
    assert lc.kernels().used("int8_linear") == ["second"]
    assert [line.split()[-1] for line in str(lc.kernels()).splitlines()[-3:]] == ["luck", "used", "present"]


@pytest.mark.parametrize("fields", [{}, {"codebook": "nf4"}, {"symmetric": True, "compute": "float"}])
def test_a_packed_model_compiles_to_one_graph_and_gives_the_same(fields):
    model = lc.WeightOnlyQuantization(**fields).compress(one_block(), lc.Context())
    inputs = {**tiny_inputs(model), "use_cache": False}
    eager = copy.deepcopy(model)
    use_plain(eager)
    with torch.no_grad():
        expected = eager(**inputs).logits
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(**inputs).logits, expected)
    layer = model.model.layers[0].mlp.up_proj
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(2, 64, requires_grad=True))
    with pytest.raises(lc.CompressionError, match="PackedLinear has no backward pass"):
        y.sum().backward()


def test_the_fake_kernel_of_packed_weights_agrees_with_the_real_one():
    layer = lc.WeightOnlyQuantization().compress(tiny_model("bert"), lc.Context()).bert.encoder.layer[0].output.dense
    grid = layer.grid
    given = (layer.columns, grid.bits, grid.group_size, grid.symmetric, grid.codebook, grid.zero_bits, "auto")
    for x in (torch.randn(3, layer.columns), torch.randn(layer.columns), torch.randn(2, layer.columns).bfloat16()):
        tensors = (x, layer.weight, layer.scale, layer.zero, layer.bias)
        torch.library.opcheck(kernels.packed_linear, (*tensors, *given), test_utils=("test_schema", "test_faketensor"))


def test_the_product_of_packed_weights_dies_with_its_weight():
    from llmcompress.quantization.kernels import packed

    model = lc.WeightOnlyQuantization().compress(tiny_model("llama"), lc.Context())
    model(**tiny_inputs(model))
    held = len(packed._PRODUCTS)
    assert held >= 14
    del model
    assert len(packed._PRODUCTS) <= held - 14


@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(4, 64, symmetric=True), Grid(4, 128, zero_bits=8)])
def test_scales_and_offsets_are_those_of_torch_int4_products(grid):
    # torch has the operator for CPUs too, with another layout of the codes but the same scales.
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    coded = quantize(weight, grid)
    scales = int4pack.scales_and_offsets(coded, grid)
    codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(coded.codes.int(), 1)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = torch.ops.aten._weight_int4pack_mm_for_cpu(x, codes, grid.group_size, scales)
    expected = x.float() @ decode(coded, grid).T
    assert ((found.float() - expected).norm() / expected.norm()).item() < 0.01
