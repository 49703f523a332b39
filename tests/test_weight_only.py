"""Few bits a weight: packing, grids by hand and against brute force, the layers, the strategy, the format."""

import itertools

import pytest
import torch
from torch import nn

import llmcompress as lc
from llmcompress.anatomy.footprint import footprint
from llmcompress.quantization import kernels
from llmcompress.quantization.fitting import fit, quantize
from llmcompress.quantization.grid import LEVELS, Coded, Grid, decode, encode, min_max
from llmcompress.quantization.packed_modules import PackedEmbedding, PackedLinear
from llmcompress.quantization.packing import pack, packed_width, unpack
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


# -- packing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 33])
def test_codes_come_back_and_no_bit_is_wasted(bits, columns):
    codes = torch.randint(0, 2**bits, (3, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, -(-columns * bits // 8)) == (3, packed_width(columns, bits))
    assert torch.equal(unpack(packed, bits, columns), codes)
    stream = [sum(int(code) << (bits * place) for place, code in enumerate(row)) for row in codes]
    assert [int.from_bytes(bytes(row.tolist()), "little") for row in packed] == stream


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_come_back_on_machines_of_the_other_byte_order(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (3, 33), dtype=torch.uint8)
    known = unpack(pack(codes, bits), bits, 33)
    monkeypatch.setattr("llmcompress.quantization.packing.sys.byteorder", "big")
    assert torch.equal(unpack(pack(codes, bits), bits, 33), known)


# -- grids --------------------------------------------------------------------------------------------------------


def test_a_grid_is_laid_as_computed_by_hand():
    weight = torch.tensor([[-1.0, 0.0, 0.5, 2.0], [1.0, 2.0, 3.0, 0.25]])
    scale, zero = min_max(weight, Grid(2, None, scale_dtype=torch.float32))
    assert scale.tolist() == [[1.0], [1.0]]
    assert zero.tolist() == [[1], [0]]
    assert encode(weight, scale, zero, Grid(2, None)).tolist() == [[0, 1, 2, 3], [1, 2, 3, 0]]  # 1.5 rounds to even


def test_a_symmetric_grid_gives_the_extra_level_to_the_larger_side():
    for weight in (torch.tensor([[-8.0, 7.0]]), torch.tensor([[8.0, -7.0]])):
        grid = Grid(4, None, symmetric=True)
        assert torch.equal(decode(quantize(weight, grid), grid), weight)


@pytest.mark.parametrize(
    "grid",
    [
        Grid(4, 32),
        Grid(3, 32, symmetric=True),
        Grid(4, 32, zero_bits=8),
        Grid(4, 32, codebook="nf4"),
        Grid(5, None, scale_dtype=torch.bfloat16),
    ],
)
def test_each_weight_goes_to_its_nearest_level(grid):
    weight = random(3, 64)
    scale, zero = min_max(weight, grid)
    values = [
        decode(Coded(torch.full((3, 64), code, dtype=torch.uint8), scale, zero), grid) for code in range(grid.limit + 1)
    ]
    nearest = (torch.stack(values) - weight).abs().amin(0)
    found = (decode(Coded(encode(weight, scale, zero, grid), scale, zero), grid) - weight).abs()
    torch.testing.assert_close(found, nearest)


def test_groups_of_zeros_and_tiny_weights_stay_finite():
    for grid in (Grid(4, 32), Grid(4, 32, symmetric=True), Grid(4, 32, codebook="nf4")):
        coded = quantize(torch.zeros(2, 64), grid)
        assert torch.equal(decode(coded, grid), torch.zeros(2, 64))
        small = decode(quantize(random(2, 64) * 1e-6, grid), grid)
        assert small.isfinite().all()
        assert small.abs().max() < 1e-4


def test_a_ragged_group_is_a_group_of_its_own():
    weight, grid = random(2, 40), Grid(4, 32)
    coded = quantize(weight, grid)
    assert coded.scale.shape == (2, 2)
    alone = quantize(weight[:, 32:], Grid(4, None))
    assert torch.equal(coded.codes[:, 32:], alone.codes)


def test_clipping_finds_the_least_squared_error_of_all_ranges_tried():
    weight = random(4, 128) ** 3
    for grid in (Grid(3, None), Grid(3, None, symmetric=True)):
        plain = (decode(quantize(weight, grid), grid) - weight).square().sum(1)
        clipped = (decode(quantize(weight, grid, "mse"), grid) - weight).square().sum(1)
        assert (clipped <= plain + 1e-6).all()
        assert clipped.sum() < 0.95 * plain.sum()


def test_clipping_weighs_errors_by_importance():
    weight = torch.cat([random(1, 31), torch.tensor([[30.0]])], dim=1)
    grid, importance = Grid(3, None), torch.ones(32)
    importance[31] = 1e6
    kept, _ = fit(weight, grid, "mse", importance)
    importance[31] = 0
    clipped, _ = fit(weight, grid, "mse", importance)
    assert clipped < 0.7 * kept
    torch.testing.assert_close(kept, fit(weight, grid)[0], rtol=0.2, atol=0)


HQQ_GRIDS = [Grid(bits, 32, symmetric) for bits in (2, 3, 4, 8) for symmetric in (False, True)]


@pytest.mark.parametrize("grid", [*HQQ_GRIDS, *(Grid(bits, 32, zero_bits=8) for bits in (2, 3, 4))])
def test_hqq_lowers_the_norm_of_the_error_it_is_made_for(grid):
    weight = random(8, 64)
    plain = (decode(quantize(weight, grid), grid) - weight).abs().pow(0.7).sum()
    robust = (decode(quantize(weight, grid, "hqq"), grid) - weight).abs().pow(0.7).sum()
    assert robust < plain


def test_codebooks_are_those_of_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    for name, levels in LEVELS.items():
        theirs = sorted(set(functional.get_4bit_type(name, device="cpu").tolist()))
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(levels))


# -- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compute", ["int8", "float", "auto"])
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("grid", [Grid(4, 32), Grid(3, None, symmetric=True), Grid(4, 16, codebook="fp4")])
def test_linear_multiplies_by_what_it_stands_for(grid, native, compute, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels.packed, "native", lambda: None)
    linear = nn.Linear(96, 40)
    layer = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid, compute)
    weight = layer.dequantized()
    with torch.no_grad():
        for shape in ((96,), (3, 96), (2, 3, 96), (0, 96)):
            x = random(*shape)
            assert layer(x).shape == (*shape[:-1], 40)
            if x.numel():
                assert relative(layer(x), x @ weight.T + linear.bias) < (1e-5 if compute == "float" else 0.03)
        assert layer(random(2, 96).bfloat16()).dtype == torch.bfloat16
    copied = kernels.takes_packed_copy(torch.device("cpu"), compute)
    assert layer.derived_bytes() >= 40 * 96 if copied else layer.derived_bytes() == 0


def test_linear_follows_a_change_of_its_codes_and_has_no_backward():
    linear, grid = nn.Linear(32, 8), Grid(4, 32)
    layer = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid)
    x = random(2, 32)
    with torch.no_grad():
        before = layer(x)
        layer.scale.neg_()
        assert relative(layer(x) - layer.bias, layer.bias - before) < 1e-5
    with pytest.raises(lc.CompressionError, match="PackedLinear has no backward pass"):
        layer(x.requires_grad_()).sum().backward()


@pytest.mark.parametrize("compute", ["int8", "float"])
@pytest.mark.parametrize("native", [True, False])
def test_linear_follows_zero_points_that_are_replaced(compute, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels.packed, "native", lambda: None)
    torch.manual_seed(0)
    linear, grid = nn.Linear(32, 8, bias=False), Grid(4, 32)
    layer = PackedLinear.from_coded(linear, quantize(linear.weight, grid), grid, compute)
    x = random(2, 32)
    with torch.no_grad():
        before = layer(x)
        layer.zero = layer.zero.bitwise_xor(1)
        expected = x @ layer.dequantized().T
        assert relative(layer(x), expected) < 0.02 < relative(before, expected)


def test_embedding_reads_its_rows():
    table, grid = nn.Embedding(10, 48, padding_idx=3), Grid(4, 16)
    layer = PackedEmbedding.from_coded(table, quantize(table.weight, grid), grid)
    ids = torch.tensor([[3, 1], [9, 0]])
    assert torch.equal(layer(ids), layer.dequantized()[ids])
    assert torch.equal(layer(ids)[0, 0], torch.zeros(48))
    assert layer.to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert layer.scale.dtype == torch.float16


# -- the strategy -------------------------------------------------------------------------------------------------


def packed(family="llama", **fields):
    return lc.WeightOnlyQuantization(**{"compute": "float", **fields}).compress(tiny_model(family), lc.Context())


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_close_in_every_family(family):
    model = packed(family, bits=8, group_size=32)
    assert relative(logits(model), logits(tiny_model(family))) < 0.02
    assert footprint(model).parameters == footprint(tiny_model(family)).parameters


@pytest.mark.parametrize(
    "fields", [{"codebook": "nf4"}, {"fit": "hqq"}, {"fit": "mse", "symmetric": True}, {"bits": 3}]
)
def test_the_model_computes_with_the_weights_it_stands_for(fields):
    model, plain = packed(**fields), tiny_model("llama")
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            plain.get_submodule(path).weight.data = module.dequantized()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-4)


def test_overrides_name_heads_and_embeddings_and_tied_ones_go_together():
    model = packed(overrides={"*.down_proj": 8, "model.embed_tokens": 4, "*.0.self_attn.*": None})
    assert model.model.layers[0].mlp.down_proj.grid.bits == 8
    assert model.model.layers[0].mlp.up_proj.grid.bits == 4
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    head, table = model.lm_head, model.model.embed_tokens
    assert head.weight is table.weight
    assert head.scale is table.scale
    assert head.zero is table.zero
    assert model.tie_weights() is None
    assert logits(model).isfinite().all()


def test_refusals_of_tied_layers_are_told():
    step = lc.WeightOnlyQuantization(overrides={"lm_head": 8}, skip=("model.embed_tokens",))
    plan = {action.path: action for action in step.plan(tiny_model("llama"), lc.Context())}
    assert "shares its weight with model.embed_tokens" in plan["lm_head"].reason


@pytest.mark.parametrize(
    "fields", [{}, {"fit": "hqq"}, {"fit": "mse", "symmetric": True}, {"codebook": "nf4"}, {"bits": 3, "fit": "hqq"}]
)
def test_zeros_of_an_earlier_pruning_stay_zeros(fields):
    steps = [lc.MagnitudePruning(pattern="2:4"), lc.WeightOnlyQuantization(compute="float", **fields)]
    model = lc.compress(tiny_model("llama"), steps, progress=False).model
    for module in model.modules():
        if isinstance(module, PackedLinear):
            fours = module.dequantized().unflatten(1, (-1, 4))
            assert ((fours == 0).sum(-1) >= 2).all()


def test_group_sizes_that_do_not_divide():
    model = tiny_model("llama")
    with pytest.raises(lc.ConfigError, match=r"group_size=48 must divide .*q_proj has 64;"):
        lc.WeightOnlyQuantization(group_size=48).compress(model, lc.Context())
    assert packed(group_size=48, indivisible="pad").model.layers[0].mlp.up_proj.scale.shape == (128, 2)
    smaller = packed(group_size=48, indivisible="smaller_group").model.layers[0].mlp.up_proj
    assert smaller.scale.shape == (128, 4)


def test_bits_told_are_bits_on_disk(tmp_path):
    for fields in ({"bits": 4}, {"bits": 3, "group_size": 32}, {"fit": "hqq", "bits": 2}, {"codebook": "nf4"}):
        model = packed(**fields)
        model.save_pretrained(tmp_path / "m")
        written = (tmp_path / "m" / "model.safetensors").stat().st_size
        assert written == footprint(model).disk_bytes
        layer = model.model.layers[0].mlp.up_proj
        stored = sum(t.nbytes for t in itertools.chain(layer.parameters(), layer.buffers()))
        assert 8 * stored / layer.dequantized().numel() == pytest.approx(layer.grid.bits_a_weight(64), abs=0.13)
    assert Grid(4, 64).bits_a_weight(4096) <= 4.6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 1}, r"bits must be in \[2, 8\], got 1"),
        ({"bits": 9}, r"bits must be in \[2, 8\], got 9"),
        ({"group_size": 7}, "group_size must be a multiple of 8, or None for a whole row, got 7"),
        ({"overrides": {"*": 1}}, r"overrides\['\*'\] must be in \[2, 8\]"),
        ({"codebook": "nf4", "bits": 3}, "bits must be 4 with codebook"),
        ({"codebook": "nf4", "fit": "mse"}, "fit must be 'min_max'"),
        ({"codebook": "nf4", "fine_zeros": True}, "fine_zeros must be None or False with codebook='nf4'"),
    ],
)
def test_bad_fields(fields, words):
    with pytest.raises(lc.ConfigError, match=words):
        lc.WeightOnlyQuantization(**fields)


def test_bad_models_are_refused_unchanged():
    for value, words in ((float("nan"), "hold NaN or infinity"), (1e9, "take scale_dtype='bfloat16'")):
        model = tiny_model("llama")
        model.model.layers[1].mlp.up_proj.weight.data[0, 0] = value
        with pytest.raises(lc.CompressionError, match=rf"layers\.1\.mlp\.up_proj.*{words}"):
            lc.WeightOnlyQuantization().compress(model, lc.Context())
        assert not any(isinstance(module, PackedLinear) for module in model.modules())
    with pytest.raises(lc.NothingToCompressError, match=r"overrides\['nothing'\]"):
        packed(overrides={"nothing": 8})
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        lc.WeightOnlyQuantization().compress(packed(), lc.Context())


@pytest.mark.skipif(not kernels.has_fbgemm(torch.device("cpu")), reason="this torch has no fbgemm")
@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("compute", ["auto", "int8", "float"])
def test_the_plan_tells_the_memory_of_the_copy(compute, native, monkeypatch):
    if not native:
        monkeypatch.setattr(kernels.packed, "native", lambda: None)
    told = kernels.takes_packed_copy(torch.device("cpu"), compute)
    if not native:
        assert told == (compute != "float")
    model = tiny_model("llama")
    plan = lc.WeightOnlyQuantization(compute=compute).plan(model, lc.Context())
    remarks = [action.reason for action in plan if action.path == ""]
    assert any("MB that is made" in remark for remark in remarks) == told
    packed = lc.WeightOnlyQuantization(compute=compute).compress(model, lc.Context())
    packed(**tiny_inputs(packed))
    made = sum(module.derived_bytes() for module in packed.modules() if isinstance(module, PackedLinear))
    weights = sum(module.rows * module.columns for module in packed.modules() if isinstance(module, PackedLinear))
    assert made >= weights if told else made == 0


@pytest.mark.parametrize("step", [lc.WeightOnlyQuantization, lc.GPTQ, lc.AWQ])
def test_weights_too_small_for_the_scales_are_refused_with_the_way_out(step):
    model = tiny_model("llama")
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-6
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False}
    with pytest.raises(lc.CompressionError, match=r"up_proj, .* too small for scales in float16: take scale_dtype='bf"):
        lc.compress(model, step(bits=4, group_size=32), **given)
    assert lc.compress(model, step(bits=4, group_size=32, scale_dtype="bfloat16"), **given).report.steps
