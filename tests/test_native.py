"""The native kernels: how they are built, loaded and threaded, and what they compute, with every set there is here."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llmcompress as lc
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import LEVELS, Grid, decode, spread
from llmcompress.quantization.kernels import int8, native
from llmcompress.quantization.kernels.native import library as native_library
from llmcompress.quantization.packed_matrix import PackedMatrix
from llmcompress.quantization.packing import pack
from native_sets import HERE, built

every_set = pytest.mark.parametrize("kernels", HERE, ids=lambda kernels: kernels.name)


def in_a_new_process(code, arguments=(), **environment):
    given = {**os.environ, **environment}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=given, capture_output=True, text=True, timeout=120)


@built
@every_set
@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 5),
    columns=st.integers(0, 70),
    limit=st.sampled_from([63, 127]),
    exponent=st.integers(-44, 38),
    seed=st.integers(0, 99),
)
@example(rows=1, columns=33, limit=127, exponent=-44, seed=0)
def test_rows_are_coded_as_the_reference_codes_them(kernels, rows, columns, limit, exponent, seed):
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    x = x.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max)
    codes, unit = native.code_rows(x, limit, kernels)
    largest = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) if columns else x.sum(-1, True)
    if columns:
        assert torch.equal(codes.float(), torch.round(x / largest * limit))
        assert torch.equal(unit[:, None], largest / limit)


@built
@every_set
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_a_row_that_is_not_finite_is_told_by_its_unit_and_spoils_no_other(kernels, value):
    x = torch.randn(4, 21)
    for row, place in ((0, 3), (2, 20)):
        x[row, place] = value
    codes, unit = native.code_rows(x, 127, kernels)
    assert unit.isnan().tolist() == [True, False, True, False]
    assert not codes[[0, 2]].any()
    # As the reference: there too a row that is not finite is NaN all over.
    coded = int8.rounded_activations(x, "token")
    assert coded.isnan().any(-1).tolist() == [True, False, True, False]


@built
@every_set
def test_many_threads_give_what_one_gives(kernels):
    x = torch.randn(300, 257)
    one = native.code_rows(x, 127, kernels)
    torch.set_num_threads(3)
    many = native.code_rows(x, 127, kernels)
    assert all(map(torch.equal, one, many))


def matrix_of(rows, columns, grid, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[::3] = 0
    coded = quantize(weight, grid)
    zero = None if coded.zero is None else pack(coded.zero, grid.zero_width)
    return coded, PackedMatrix(pack(coded.codes, grid.bits).view(torch.int8), coded.scale, zero, grid, columns)


def reference(x, coded, grid, kernels, *, exact):
    """The product in float64: of what the kernels say that they multiply."""
    weight = decode(coded, grid).double()
    if exact:
        return x.double() @ weight.T
    if by_tiles(kernels, grid, x):
        weight = decode(coded, grid).bfloat16().double()
    elif grid.codebook:
        steps, unit = native.codebook_steps(grid.codebook)
        levels = (torch.tensor(steps).double() - 64) * unit
        assert (levels - torch.tensor(LEVELS[grid.codebook])).abs().max() < 1 / 110
        weight = levels[coded.codes.int()] * spread(coded.scale.double(), grid, x.shape[1])
    limit = native.activation_limit(grid, kernels)
    largest = x.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return (torch.round(x / largest * limit).double() * (largest / limit).double()) @ weight.T


def by_tiles(kernels, grid, x):
    """Whether the set multiplies these rows by tiles of bfloat16: where tiles of whole numbers do not come out even."""
    size = grid.size(x.shape[1])
    even = grid.bits != 2 and -(-min(size, 512) // 4) % 16 == 0
    fits = size == x.shape[1] or size % 16 == 0
    return kernels.name == "avx512_amx" and len(x) >= 12 and fits and not even


@st.composite
def grids(draw):
    codebook = draw(st.sampled_from([None, None, None, "nf4", "fp4"]))
    bits = 4 if codebook else draw(st.sampled_from([2, 3, 4, 4, 4, 5, 6, 7, 8, 8]))
    return Grid(
        bits,
        draw(st.sampled_from([8, 16, 32, 64, 128, None, 10, 48])),
        symmetric=codebook is None and draw(st.booleans()),
        codebook=codebook,
        scale_dtype=draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])),
        zero_bits=draw(st.sampled_from([None, 8])),
    )


@built
@every_set
@settings(deadline=None, max_examples=120)
@given(
    grid=grids(),
    rows=st.integers(1, 40),
    columns=st.one_of(st.integers(1, 300), st.sampled_from([128, 256, 512, 1100])),
    batch=st.one_of(st.integers(0, 6), st.integers(10, 21)),
    threads=st.integers(1, 3),
    exact=st.booleans(),
    bias=st.booleans(),
)
@example(grid=Grid(4, 32), rows=39, columns=96, batch=1, threads=1, exact=False, bias=True)
@example(grid=Grid(4, None, symmetric=True), rows=64, columns=2100, batch=16, threads=3, exact=False, bias=True)
@example(grid=Grid(4, None, symmetric=True), rows=20, columns=20, batch=12, threads=1, exact=False, bias=False)
@example(grid=Grid(4, 32), rows=70, columns=700, batch=40, threads=2, exact=False, bias=True)
@example(grid=Grid(3, 16), rows=70, columns=700, batch=17, threads=2, exact=False, bias=False)
@example(grid=Grid(2, 128), rows=33, columns=1000, batch=33, threads=2, exact=False, bias=True)
@example(grid=Grid(2, 64), rows=33, columns=1000, batch=33, threads=1, exact=False, bias=False)
@example(grid=Grid(6, 48), rows=33, columns=1000, batch=33, threads=1, exact=False, bias=True)
@example(grid=Grid(8, 64), rows=7, columns=1100, batch=3, threads=1, exact=False, bias=False)
def test_a_packed_product_is_that_of_what_its_codes_stand_for(
    kernels, grid, rows, columns, batch, threads, exact, bias
):
    torch.set_num_threads(threads)
    coded, matrix = matrix_of(rows, columns, grid)
    x = torch.randn(batch, columns, generator=torch.Generator().manual_seed(1)) * 3
    x[1:2] = 0
    added = torch.randn(rows, generator=torch.Generator().manual_seed(2)) if bias else None
    found = native.NativeProduct(matrix, kernels, exact=exact)(x, added, matrix)
    expected = reference(x, coded, grid, kernels, exact=exact) + (0 if added is None else added)
    # What the terms add up to without their signs, and not the result, which they may all but cancel out to.
    size = float(x.norm(dim=-1).max() * decode(coded, grid).norm(dim=-1).max()) if batch else 0.0
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=4e-7 * max(size, 25))


@built
@every_set
@pytest.mark.parametrize("batch", [2, 16])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(8, None)])
def test_what_is_not_finite_comes_out_as_the_reference_has_it(kernels, grid, batch):
    coded, matrix = matrix_of(20, 100, grid)
    x = torch.randn(batch, 100)
    x[1, 7] = float("inf")
    x[0, 99] = float("nan")
    exact = native.NativeProduct(matrix, kernels, exact=True)(x, None, matrix)
    torch.testing.assert_close(exact, x @ decode(coded, grid).T, equal_nan=True)
    coarse = native.NativeProduct(matrix, kernels, exact=False)(x, None, matrix)
    assert coarse[:2].isnan().all()
    assert coarse[2:].isfinite().all()


@built
def test_an_input_of_another_length_is_refused():
    _, matrix = matrix_of(8, 32, Grid(4, 32))
    with pytest.raises(RuntimeError, match="32 inputs"):
        native.NativeProduct(matrix, HERE[0], exact=False)(torch.zeros(1, 31), None, matrix)


@built
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.zeros(8, 15, dtype=torch.int8)}, r"codes of a packed layer .* \(8, 16\) .*\(8, 15\)"),
        ({"weight": torch.zeros(8, 16)}, "int8 or uint8 .* got float32"),
        ({"scale": torch.ones(8, 2)}, r"scales of a packed layer .* \(8, 1\) .*\(8, 2\)"),
        ({"scale": torch.ones(8, 1, dtype=torch.float64)}, "got float64"),
        ({"zero": torch.zeros(7, 1, dtype=torch.uint8)}, r"zero points of a packed layer .* \(8, 1\)"),
    ],
)
def test_a_matrix_that_is_not_what_its_grid_says_is_refused_and_not_read_beyond(changed, message):
    _, matrix = matrix_of(8, 32, Grid(4, 32))
    with pytest.raises(RuntimeError, match=message):
        native.NativeProduct(replace(matrix, **changed), HERE[0], exact=False)


@built
def test_a_bias_of_another_length_is_refused():
    _, matrix = matrix_of(8, 32, Grid(4, 32))
    product = native.NativeProduct(matrix, HERE[0], exact=False)
    with pytest.raises(RuntimeError, match=r"bias of a packed layer must be float32 \(8,\)"):
        product(torch.zeros(1, 32), torch.ones(1), matrix)


SHORT_OF_MEMORY = """
import resource, sys, torch
from llmcompress.quantization.grid import Grid
from llmcompress.quantization.kernels import native
from llmcompress.quantization.packed_matrix import PackedMatrix
columns, rows = 2**24, int(sys.argv[2])
grid = Grid(3, None, symmetric=True)
weight, scale = torch.zeros(1, columns * 3 // 8, dtype=torch.int8), torch.ones(1, 1)
kernels = native.load(sys.argv[1])
matrix = PackedMatrix(weight, scale, None, grid, columns)
product = native.NativeProduct(matrix, kernels, exact=False)
x = torch.zeros(rows, columns)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + int(sys.argv[3]) * 2**20
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
try:
    product(x, None, matrix)
except MemoryError as error:
    resource.setrlimit(resource.RLIMIT_AS, before)
    print(error)
"""


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is Linux's")
@pytest.mark.skipif("asan" in os.environ.get("LD_PRELOAD", ""), reason="the sanitizer needs memory of its own")
@pytest.mark.parametrize(
    ("name", "rows", "room"),
    [
        pytest.param(HERE[0].name if HERE else "", 1, 4, id="before the loop"),
        pytest.param("portable", 6, 160, id="on its threads"),
    ],
)
def test_too_little_memory_is_an_error_and_not_the_end_of_the_process(name, rows, room):
    done = in_a_new_process(SHORT_OF_MEMORY, arguments=(name, str(rows), str(room)))
    assert done.returncode == 0, done.stderr
    assert "no memory for the codes of activations" in done.stdout


THREADS = """
import os, torch
from llmcompress.quantization.kernels import native
x = torch.randn(600, 400)
torch.set_num_threads(2)
kernels = native.native()
assert kernels.parallel
def tasks(): return len(os.listdir("/proc/self/task"))
x @ x.T[:400]  # torch has its threads now
before = tasks()
# Compared as bytes: torch's own loops do hang in a forked child.
def codes(): return native.code_rows(x, 127, kernels)[0].numpy().tobytes()
expected = codes()
assert tasks() == before, "the kernels brought threads of their own"
child = os.fork()
if child == 0:
    os._exit(0 if codes() == expected else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@built
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_torchs_own_threads_are_used_and_a_forked_child_does_not_wait_for_them():
    done = in_a_new_process(THREADS, LLMCOMPRESS_NATIVE="")
    assert done.returncode == 0, done.stderr


@built
def test_the_environment_chooses_the_set(monkeypatch):
    choose = native_library.native.__wrapped__  # what this process has chosen is kept
    monkeypatch.setenv("LLMCOMPRESS_NATIVE", "portable")
    assert choose().name == "portable"
    monkeypatch.setenv("LLMCOMPRESS_NATIVE", "off")
    assert choose() is None
    assert native_library.why_absent() == "LLMCOMPRESS_NATIVE other than 'off'"
    monkeypatch.setenv("LLMCOMPRESS_NATIVE", "sse")
    with pytest.raises(lc.ConfigError, match="LLMCOMPRESS_NATIVE must be one of avx512_amx"):
        choose()


def test_kernels_tells_which_set_runs():
    told = lc.kernels().machine["native kernels"]
    assert told == HERE[0].name if HERE else told.startswith("no: needs")


def test_a_library_of_other_sources_is_not_used(monkeypatch, tmp_path):
    from llmcompress.quantization.kernels.native import build, library

    monkeypatch.setattr(build, "LIBRARY", tmp_path / "none.so")
    with pytest.raises(native.NotBuilt, match="compiler at installation"):
        library._library.__wrapped__()
    if HERE:
        monkeypatch.undo()
        monkeypatch.setattr(build, "sources_hash", lambda: "other")
        with pytest.warns(UserWarning, match="built of other sources"), pytest.raises(native.NotBuilt):
            library._library.__wrapped__()
