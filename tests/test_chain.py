"""Chains of steps in the native kernels: each step is what its own call computes, to the last bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import llmcompress as lc
from llmcompress.quantization.affine import quantize_rows
from llmcompress.quantization.fast_path import leave_fast_path
from llmcompress.quantization.grid import Coded, Grid, encode, min_max
from llmcompress.quantization.kernels import Int8Weight, Stored
from llmcompress.quantization.kernels.native import Chain, NativeProduct, activate, layer_norm, rms_norm
from llmcompress.quantization.packed_matrix import PackedMatrix
from llmcompress.quantization.packing import pack
from llmcompress.testing import tiny_model
from native_sets import HERE, built

pytestmark = built
every_set = pytest.mark.parametrize("kernels", HERE, ids=lambda kernels: kernels.name)


def int8(kernels, source, inputs, outputs):
    codes, scale = quantize_rows(torch.randn(outputs, inputs, generator=source))
    return Int8Weight(codes, scale, torch.randn(outputs, generator=source), kernels)


def packed(kernels, source, inputs, outputs, *, exact=False):
    grid, weight = Grid(4, 32), torch.randn(outputs, inputs, generator=source)
    scale, zero = min_max(weight, grid)
    coded = Coded(encode(weight, scale, zero, grid), scale, zero)
    zeros = None if coded.zero is None else pack(coded.zero, grid.zero_width)
    matrix = PackedMatrix(pack(coded.codes, 4).view(torch.int8), coded.scale, zeros, grid, inputs)
    return NativeProduct(matrix, kernels, exact=exact), matrix


@every_set
@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 1100),
    width=st.integers(1, 70),
    inner=st.integers(1, 90),
    activations=st.sampled_from(["token", "tensor", Stored.of(0.03, 120)]),
    gate=st.sampled_from(["gelu", "gelu_tanh", "silu"]),
    seed=st.integers(0, 99),
)
def test_a_chain_of_int8_is_its_steps(kernels, rows, width, inner, activations, gate, seed):
    source = torch.Generator().manual_seed(seed)
    up, down = int8(kernels, source, width, inner), int8(kernels, source, inner, width)
    weight, bias, x = (torch.randn(size, generator=source) for size in ((width,), (width,), (rows, width)))
    chain = Chain(kernels)
    given_x = chain.given(width)
    states = chain.layer_norm(given_x, weight, bias, 1e-5)
    hidden = chain.activate(gate, chain.product(states, up.step(activations)))
    y = chain.add(chain.product(hidden, down.step(activations)), given_x)
    run = chain.finish(states, y)
    expected = layer_norm(x, weight, bias, 1e-5, kernels)
    summed = down(activate(gate, up(expected, None, activations), kernels), None, activations) + x
    assert all(map(torch.equal, run(x), (expected, summed)))
    assert all(map(torch.equal, run(x.view(1, rows, width)), (expected[None], summed[None])))


@every_set
@settings(deadline=None, max_examples=20)
@given(rows=st.integers(1, 600), groups=st.integers(1, 3), exact=st.booleans(), seed=st.integers(0, 99))
def test_a_chain_of_packed_products_is_its_steps(kernels, rows, groups, exact, seed):
    source, width = torch.Generator().manual_seed(seed), 32 * groups
    (gate, first), (up, second), (down, third) = (packed(kernels, source, width, width, exact=exact) for _ in range(3))
    weight, bias, x = (torch.randn(size, generator=source) for size in ((width,), (width,), (rows, width)))
    chain = Chain(kernels)
    given_x = chain.given(width)
    states = chain.rms_norm(given_x, weight, 1e-6)
    inner = chain.activate("silu", chain.product(states, gate.step(None)))
    inner = chain.multiply(inner, chain.product(states, up.step(bias)))
    run = chain.finish(chain.add(chain.product(inner, down.step(None)), given_x))
    normed = rms_norm(x, weight, 1e-6, kernels)
    expected = activate("silu", gate(normed, None, first), kernels) * up(normed, bias, second)
    assert torch.equal(run(x)[0], down(expected, None, third) + x)


@every_set
@settings(deadline=None, max_examples=30)
@given(rows=st.integers(1, 40), heads=st.integers(1, 5), half=st.integers(1, 33), seed=st.integers(0, 99))
def test_heads_are_normalized_and_rotated(kernels, rows, heads, half, seed):
    source, head = torch.Generator().manual_seed(seed), 2 * half
    x, weight = torch.randn(rows, heads * head, generator=source), torch.randn(head, generator=source)
    cosines, sines = (torch.randn(rows, head, generator=source) for _ in range(2))
    chain = Chain(kernels)
    vectors, c, s = chain.given(heads * head), chain.given(head), chain.given(head)
    run = chain.finish(chain.rotate(chain.rms_norm(vectors, weight, 1e-6), c, s))
    normed = rms_norm(x.view(rows, heads, head), weight, 1e-6, kernels)
    turned = torch.cat((-normed[..., half:], normed[..., :half]), dim=-1)
    expected = normed * cosines[:, None] + turned * sines[:, None]
    assert torch.equal(run(x, cosines, sines)[0], expected.view(rows, -1))


@every_set
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(kernels, threads):
    source, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    up = int8(kernels, source, 96, 512)
    chain = Chain(kernels)
    run = chain.finish(chain.activate("gelu", chain.product(chain.given(96), up.step("token"))))
    x = torch.randn(700, 96, generator=source)
    alone = torch.cat([run(row[None])[0] for row in x])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run(x)[0], alone)
    finally:
        torch.set_num_threads(before)


def test_what_does_not_fit_is_refused_before_it_is_run():
    source = torch.Generator().manual_seed(0)
    product = int8(HERE[0], source, 8, 4)
    chain = Chain(HERE[0])
    x, other = chain.given(8), chain.given(6)
    for wrong in (
        lambda: chain.product(other, product.step("token")),
        lambda: chain.add(x, other),
        lambda: chain.rms_norm(x, torch.ones(3), 1e-5),
        lambda: chain.rms_norm(x, torch.ones(0), 1e-5),
        lambda: chain.rms_norm(x, torch.ones(8, dtype=torch.float64), 1e-5),
        lambda: chain.layer_norm(x, torch.ones(8), torch.ones(7), 1e-5),
        lambda: chain.rotate(x, other, other),
    ):
        with pytest.raises(RuntimeError):
            wrong()
    run = chain.finish(chain.product(x, product.step("token")), chain.activate("silu", other))
    good = torch.ones(2, 8), torch.ones(2, 6)
    assert [len(y) for y in run(*good)] == [2, 2]
    for x, other in (
        (torch.ones(2, 7), good[1]),
        (good[0], torch.ones(3, 6)),
        (good[0].double(), good[1]),
        (good[0], torch.ones(6, 2).T),
        (good[0].to("meta"), good[1]),
    ):
        with pytest.raises(RuntimeError, match="a chain was given"):
            run(x, other)


def test_rows_go_by_in_parts_as_equal_as_may_be():
    source = torch.Generator().manual_seed(0)
    up, down = int8(HERE[0], source, 16, 512), int8(HERE[0], source, 512, 16)
    chain = Chain(HERE[0])
    run = chain.finish(chain.product(chain.product(chain.given(16), up.step("token")), down.step("token")))
    for rows in (1, 511, 512, 513, 5000):
        x = torch.randn(rows, 16, generator=source)
        assert torch.equal(run(x)[0], down(up(x, None, "token"), None, "token"))


@pytest.mark.parametrize("strategy", [lc.DynamicQuantization(), lc.WeightOnlyQuantization()])
def test_chains_forget_no_infinity(strategy):
    model = strategy.compress(tiny_model("llama"), lc.Context())
    block, x = model.model.layers[0], torch.randn(2, 5, 64)
    x[1, 2, 3] = float("inf")
    rotary = (torch.ones(2, 5, 16), torch.zeros(2, 5, 16))
    with torch.no_grad():
        y = block(x, position_embeddings=rotary)
        leave_fast_path(model)
        assert torch.equal(y.isnan(), block(x, position_embeddings=rotary).isnan())
    assert y[0].isfinite().all()
