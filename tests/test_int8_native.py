"""The int8 product in C++ against the reference in torch, with every instruction set that this machine has."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from llmcompress.quantization import kernels
from llmcompress.quantization.kernels import int8, int8_native
from llmcompress.quantization.modules import Int8Linear
from native_sets import HERE, built

pytestmark = built
every_set = pytest.mark.parametrize("own", HERE, ids=lambda own: own.name)
WAYS = ["tensor", "token", "stored"]


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def bits_of(own):
    return [7] if own.name == "avx2" else [7, 8]


def weight_of(outputs, inputs, kind, generator):
    """Codes of which AVX2 can add two products in 16 bits: nearly all, some, or none."""
    if kind == "normal":
        codes = torch.randn(outputs, inputs, generator=generator) * 32
    elif kind == "uniform":
        codes = torch.randint(-127, 128, (outputs, inputs), generator=generator)
    else:
        codes = torch.full((outputs, inputs), 127) * (1 if kind == "largest" else -1)
    return codes.clamp(-127, 127).round().to(torch.int8)


@every_set
@settings(deadline=None, max_examples=150)
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 150),
    kind=st.sampled_from(["normal", "uniform", "largest", "smallest"]),
    way=st.sampled_from(WAYS),
    bits=st.sampled_from([7, 8]),
    bias=st.booleans(),
    exponent=st.integers(-44, 30),
    threads=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@example(rows=66000, inputs=3, outputs=5, kind="normal", way="token", bits=7, bias=True, exponent=0, threads=2, seed=0)
@example(
    rows=500, inputs=1024, outputs=33, kind="normal", way="tensor", bits=7, bias=True, exponent=0, threads=2, seed=0
)
def test_product_is_that_of_the_reference(own, rows, inputs, outputs, kind, way, bits, bias, exponent, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = weight_of(outputs, inputs, kind, generator)
    scale = torch.rand(outputs, generator=generator) + 0.5
    added = torch.randn(outputs, generator=generator) if bias else None
    x = (torch.randn(rows, inputs, generator=generator) + 0.3) * 10.0**exponent
    with pytest.MonkeyPatch.context() as patch:
        for module in (int8, int8_native):
            patch.setattr(module, "activation_bits", lambda: bits if bits in bits_of(own) else 7)
        # A range that some inputs leave on both sides.
        given_way = kernels.Stored.of(10.0 ** max(min(exponent, 35), -35) / 100, 90) if way == "stored" else way
        torch.set_num_threads(threads)
        found = kernels.Int8Weight(weight, scale, added, own)(x, added, given_way)
        # In double, where the sums of the reference are exact too.
        codes, zero, unit = int8._code(x, given_way)
        expected = ((codes - zero).double() @ weight.double().T) * (unit * scale).double()
        expected = expected + added if bias else expected
        largest = (unit * scale).abs().max().item() if rows else 0.0
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6 * (largest + 1))


@every_set
@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=40)
@given(columns=st.integers(1, 70), exponent=st.integers(-44, 38), seed=st.integers(0, 99))
def test_codes_are_the_very_ones_of_the_reference(own, way, columns, exponent, seed):
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x = x.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
    given_way = kernels.Stored.of(10.0 ** max(min(exponent, 35), -35) / 100, 90) if way == "stored" else way
    ones = kernels.Int8Weight(torch.eye(columns, dtype=torch.int8), torch.ones(columns), None, own)
    # Both are NaN where the range itself is too large for a float.
    expected = int8.rounded_activations(x, given_way)
    torch.testing.assert_close(ones(x, None, given_way), expected, rtol=0, atol=0, equal_nan=True)


@every_set
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_comes_out_as_of_the_reference(own, way, value, monkeypatch):
    monkeypatch.setattr(int8, "native", lambda: own)
    bits = int8.activation_bits.__wrapped__  # not what was kept of the set that this machine takes
    for module in (int8, int8_native):
        monkeypatch.setattr(module, "activation_bits", bits)
    x, weight = torch.randn(7, 21), torch.randint(-127, 128, (19, 21)).to(torch.int8)
    x[2, 20] = x[5, 3] = value
    given_way = kernels.Stored.of(0.05, 90) if way == "stored" else way
    found = kernels.Int8Weight(weight, torch.ones(19), None, own)(x, None, given_way)
    expected = kernels.torch_linear(x, weight, torch.ones(19), None, given_way)
    torch.testing.assert_close(found, expected, equal_nan=True)
    spoiled = 0 if way == "stored" and value == value else 2 if way != "tensor" else 7
    assert found.isnan().all(1).sum() == found.isnan().any(1).sum() == spoiled


def test_an_input_of_another_size_is_refused():
    layer = Int8Linear.from_float(nn.Linear(8, 4))
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"8 inputs on the CPU was given \(2, 9\)"):
        layer(torch.randn(2, 9))


@pytest.mark.parametrize(
    ("weight", "scale", "bias", "message"),
    [
        (torch.zeros(8, 16), torch.ones(8), None, "codes of an int8 layer must be int8"),
        (torch.zeros(8, 16, dtype=torch.int8), torch.ones(7), None, r"scales .* \(8,\) .* \(7,\)"),
        (torch.zeros(8, 16, dtype=torch.int8), torch.ones(8), torch.ones(1), r"bias .* \(8,\) .* \(1,\)"),
    ],
)
def test_tensors_that_do_not_fit_one_another_are_refused_and_not_read_beyond(weight, scale, bias, message):
    with pytest.raises(RuntimeError, match=message):
        kernels.Int8Weight(weight, scale, bias, HERE[0])


def test_the_packed_weight_is_little_more_than_the_codes():
    weight = torch.randn(768, 768, generator=torch.Generator().manual_seed(0)) * 32
    copy = kernels.Int8Weight(weight.clamp(-127, 127).to(torch.int8), torch.ones(768), None, HERE[0])
    assert weight.numel() < copy.nbytes < 1.06 * weight.numel()
