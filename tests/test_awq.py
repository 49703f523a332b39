"""AWQ: the objective against brute force, the clip and the scale search, folding, the strategy."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.anatomy.layers import select
from llmcompress.anatomy.scaling import scale_sites
from llmcompress.calibration import observe
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.quantization.clipping import clipped, output_errors
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Coded, Grid, decode, encode, min_max
from llmcompress.quantization.packed_modules import PackedEmbedding, PackedLinear
from llmcompress.quantization.scale_search import InputMoments, Reader, search_scales
from llmcompress.testing import tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).parents[2] / "shared" / "assets"


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def seen(x):
    moments = InputMoments(x.shape[1])
    moments.update(x)
    return moments


def on(found, weight, grid):
    return decode(Coded(encode(weight, *found, grid), *found), grid)


def texts(model, data=None):
    return Context(data=tiny_data(model) if data is None else data, tokenizer=tiny_tokenizer(), progress=False)


def run(step, model, data=None):
    """Compress `model` in place, and return it with what was told of it."""
    context = texts(model, data)
    actions = [*step.plan(model, context)]
    return step.compress(model, context), {action.path: action for action in [*actions, *context.told]}


def awq(**fields):
    return lc.AWQ(**{"group_size": 32, "compute": "float", "samples": 16, "fine_zeros": False, **fields})


# -- the objective ------------------------------------------------------------------------------------------------


def test_the_error_of_the_outputs_is_exact():
    model = tiny_model("llama")
    [layer] = select(model, who="test", targets=("model.layers.1.mlp.down_proj",))[0]
    inputs = []
    hook = layer.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, 1)))
    [moments] = observe(model, [tiny_inputs(model)], [layer], InputMoments.of, who="test")[layer.name]
    hook.remove()
    x, weight = inputs[-1].double(), layer.weight.detach()
    rounded = decode(quantize(weight, Grid(3, 32)), Grid(3, 32))
    expected = (x @ (rounded - weight).double().T).square().sum(0)
    found = output_errors(weight, rounded, moments.products)
    assert torch.allclose(found.double(), expected, rtol=1e-3)
    assert torch.allclose(moments.magnitudes.double(), x.abs().sum(0), rtol=1e-5)


def test_divided_sums_are_those_of_divided_inputs():
    x, factors = random(50, 8), random(8, seed=1).exp()
    moments = seen(x)
    moments.divide(factors)
    expected = seen(x / factors)
    assert torch.allclose(moments.products, expected.products, rtol=1e-4, atol=1e-5)
    assert torch.allclose(moments.magnitudes, expected.magnitudes, rtol=1e-5)


# -- clipping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "grid",
    [
        Grid(3, 16),
        Grid(4, None),
        Grid(2, 16, symmetric=True),
        Grid(3, 24),  # a shorter last group
        Grid(3, 16, zero_bits=8),
        Grid(8, 16, scale_dtype=torch.bfloat16),
    ],
)
def test_no_row_is_worse_with_clipping(grid):
    weight, x = random(20, 64), random(200, 64, seed=1) @ random(64, 64, seed=2)
    products = x.T @ x
    before = output_errors(weight, on(min_max(weight, grid), weight, grid), products)
    after = output_errors(weight, on(clipped(weight, grid, products), weight, grid), products)
    assert (after <= before * 1.0001).all()
    assert after.sum() < 0.9 * before.sum()


def test_the_groups_of_a_row_are_clipped_together():
    grid, weight = Grid(3, 16), random(20, 64)
    x = random(200, 4, seed=1) @ random(4, 64, seed=2)  # errors of one group can cancel those of another
    products = x.T @ x
    alone = products * torch.block_diag(*[torch.ones(16, 16)] * 4)
    apart = output_errors(weight, on(clipped(weight, grid, alone), weight, grid), products).sum()
    assert output_errors(weight, on(clipped(weight, grid, products), weight, grid), products).sum() < 0.7 * apart


def test_rows_do_not_depend_on_the_rows_beside_them(monkeypatch):
    grid, weight, x = Grid(3, 16), random(9, 32), random(80, 32, seed=1)
    whole = clipped(weight, grid, x.T @ x)
    monkeypatch.setattr("llmcompress.quantization.clipping._HELD", 1)
    assert all(torch.equal(a, b) for a, b in zip(whole, clipped(weight, grid, x.T @ x), strict=True))


def test_without_inputs_the_range_covers():
    weight, grid = random(4, 32), Grid(4, 16)
    found = clipped(weight, grid, torch.zeros(32, 32))
    assert all(torch.equal(a, b) for a, b in zip(found, min_max(weight, grid), strict=True))


# -- scales -------------------------------------------------------------------------------------------------------


def planted(model):
    """Return the site behind the first norm of a Llama, and inputs with four outlier channels."""
    [site, *_] = [site for site in scale_sites(model) if site.kind == "norm"]
    x = random(300, site.channels)
    x[:, :4] *= 50
    return site, x


def test_outlier_channels_are_rounded_more_finely():
    model = tiny_model("llama")
    site, x = planted(model)
    weight, grid = random(48, site.channels, seed=3), Grid(3, 32)
    choice = search_scales(site, [Reader(weight, grid, seen(x))], 20)
    plain = (x @ (on(min_max(weight, grid), weight, grid) - weight).T).square().sum() / len(x)
    scaled = weight * choice.scales
    rounded = on(min_max(scaled, grid), scaled, grid) / choice.scales
    found = (x @ (rounded - weight).T).square().sum() / len(x)
    assert choice.scales[:4].amin() > choice.scales[4:].amax()
    assert choice.before == pytest.approx(plain.item(), rel=1e-3)
    assert choice.after == pytest.approx(found.item(), rel=1e-3)
    assert choice.after < 0.5 * choice.before


def test_the_search_does_not_depend_on_how_many_candidates_are_held(monkeypatch):
    site, x = planted(tiny_model("llama"))
    readers = [Reader(random(48, site.channels), Grid(4, 32), seen(x))]
    whole = search_scales(site, readers, 7)
    monkeypatch.setattr("llmcompress.quantization.scale_search._HELD", 1)
    again = search_scales(site, readers, 7)
    assert torch.equal(whole.scales, again.scales)
    assert whole.after == pytest.approx(again.after)


def test_dead_and_pruned_channels_are_left():
    site, x = planted(tiny_model("llama"))
    x[:, 5] = 0
    weight = random(48, site.channels)
    weight[:, 6] = 0
    scales = search_scales(site, [Reader(weight, Grid(3, 32), seen(x))], 20).scales
    assert scales[5] == scales[6] == 1
    assert torch.isfinite(scales).all()
    assert (scales > 0).all()
    assert search_scales(site, [Reader(weight, Grid(3, 32), seen(0 * x))], 20).scales.eq(1).all()


def test_values_that_several_queries_read_get_one_scale():
    model = tiny_model("llama")
    [site, *_] = [site for site in scale_sites(model) if site.source.endswith("v_proj")]
    assert site.channels < len(site.columns)
    x = random(200, len(site.columns)) * (1 + 9 * (site.columns == 3))
    choice = search_scales(site, [Reader(random(32, len(site.columns)), Grid(3, 32), seen(x))], 20)
    assert choice.scales.shape == (site.channels,)
    assert choice.scales.argmax() == 3


# -- the strategy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma", "phi3", "gpt2", "opt", "mixtral"])
def test_with_eight_bits_the_model_is_what_it_was(family):
    model = tiny_model(family)
    batch = tiny_inputs(model)
    expected = model(**batch).logits
    model, told = run(awq(bits=8), model)
    assert any("output divided by" in (action.does or "") for action in told.values())
    error = (model(**batch).logits - expected).norm() / expected.norm()
    assert error < 0.02


@pytest.mark.parametrize("inputs", ["quantized", "dense"])
def test_layers_with_outlier_inputs_are_nearer_than_with_rounding(inputs):
    def error(step):
        model = tiny_model("llama")
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight[:4] *= 30
        expected, found = queries(model), queries(run(step, model)[0])
        return ((found - expected).norm() / expected.norm()).item()

    plain = error(lc.WeightOnlyQuantization(bits=3, group_size=32, compute="float"))
    assert error(awq(bits=3, clip=False, inputs=inputs)) < 0.7 * plain
    assert error(awq(bits=3, scales=False, inputs=inputs)) < 0.7 * plain
    assert error(awq(bits=3, inputs=inputs)) < 0.6 * plain


def queries(model):
    """Return what the first block's query projection puts out."""
    kept = []
    hook = model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *call: kept.append(call[-1]))
    model(**tiny_inputs(model))
    hook.remove()
    return kept[0]


def test_experts_are_scaled_with_the_norm_before_them_and_clipped_one_by_one():
    def model_with_outliers():
        model = tiny_model("mixtral")
        with torch.no_grad():
            model.model.layers[0].post_attention_layernorm.weight[:4] *= 30
        return model

    def output(model):
        kept = []
        model.model.layers[0].mlp.experts.register_forward_hook(lambda *call: kept.append(call[-1]))
        model(**tiny_inputs(model))
        return kept[0]

    def error(step):
        model, told = run(step, model_with_outliers())
        expected = output(model_with_outliers())
        return ((output(model) - expected).norm() / expected.norm()).item(), told

    wide = "model.layers.0.mlp.experts.gate_up_proj"
    plain, _ = error(lc.WeightOnlyQuantization(bits=3, group_size=32, compute="float", targets=(wide,)))
    aware, told = error(awq(bits=3, targets=(wide,)))
    assert aware < 0.6 * plain
    assert error(awq(bits=3, targets=(wide,), scales=False))[0] < 0.8 * plain
    assert told[wide].reason == "scaled with model.layers.0.post_attention_layernorm"
    assert wide in told["model.layers.0.post_attention_layernorm"].reason
    _, told = run(awq(), model_with_outliers())
    assert "clipped, not scaled" in told["model.layers.0.mlp.experts.down_proj"].reason


def test_experts_that_no_token_reaches_are_rounded_plainly_and_told():
    model, name = tiny_model("mixtral"), "model.layers.1.mlp.experts.down_proj"
    model.model.layers[1].mlp.gate.weight.data.zero_()  # the same two of four for every token
    weights, grid = model.model.layers[1].mlp.experts.down_proj.detach().clone(), Grid(4, 32)
    model, told = run(awq(scales=False), model)
    packed = model.model.layers[1].mlp.experts
    plain = [torch.equal(packed.matrix("down_proj", n), on(min_max(w, grid), w, grid)) for n, w in enumerate(weights)]
    left = ", ".join(str(number) for number, same in enumerate(plain) if same)
    assert sum(plain) == 2
    assert told[name].reason == f"experts {left}: rounded plainly: no calibration token reached it"


def test_the_report_tells_what_each_layer_is_scaled_with():
    _, told = run(awq(), tiny_model("gpt2"))
    assert told["transformer.h.0.mlp.c_fc"].reason == "scaled with transformer.h.0.ln_2"
    assert "not scaled: nothing before it" in told["transformer.h.0.mlp.c_proj"].reason
    assert "mean|x|" in told["transformer.h.0.ln_1"].does


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = type(tiny_model("llama"))(tiny_model("llama").config)
    actions = awq(fine_zeros=True).plan(model, Context())
    assert sum(action.touched for action in actions) == 14


@pytest.mark.parametrize("fields", [{}, {"fine_zeros": True}])
def test_zeros_of_a_pruned_model_stay(fields):
    model = lc.MagnitudePruning(pattern="2:4").compress(tiny_model("llama"), Context())
    model, _ = run(awq(**fields), model)
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed
    for module in packed:
        assert module.grid.zero_bits is None
        assert ((module.dequantized() == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()


def test_fine_zero_points_are_stored_and_told():
    model, told = run(awq(fine_zeros=True), tiny_model("llama"))
    assert model.model.layers[0].mlp.up_proj.grid.zero_bits == 8
    assert told["model.layers.0.mlp.gate_proj"].does == "int4, groups of 32: 4.75 bits a weight"


def test_embeddings_are_rounded_plainly_and_tied_ones_by_what_the_head_sees():
    grid = Grid(4, 32)
    model = tiny_model("gpt2")
    tokens, positions = (table.weight.detach().clone() for table in (model.transformer.wte, model.transformer.wpe))
    model, told = run(awq(targets=("*.c_fc", "lm_head", "*.wpe"), scales=False), model)
    assert isinstance(model.transformer.wte, PackedEmbedding)
    assert model.transformer.wte.weight is model.lm_head.weight
    assert not torch.equal(model.transformer.wte.dequantized(), on(min_max(tokens, grid), tokens, grid))
    assert torch.equal(model.transformer.wpe.dequantized(), on(min_max(positions, grid), positions, grid))
    assert told["transformer.wpe"].reason.startswith("rounded plainly")


def test_a_layer_that_no_token_reaches_is_rounded_plainly_and_told():
    model = tiny_model("llama")
    network = model.model.layers[1].mlp
    network.forward = lambda x: x  # its projections never run
    weight, grid = network.up_proj.weight.detach().clone(), Grid(4, 32)
    _, told = run(awq(scales=False), model)
    assert torch.equal(network.up_proj.dequantized(), on(min_max(weight, grid), weight, grid))
    assert told["model.layers.1.mlp.up_proj"].reason == "rounded plainly: no calibration token reached it"


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason="needs shared/assets beside the checkout")
def test_a_trained_model_loses_less_than_by_rounding():
    folder = ASSETS / "stories260K-hf"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    story = next((ASSETS / "tinystories").glob("*.txt")).read_text(encoding="utf-8")
    held_out = tokenizer(story[:20_000], return_tensors="pt", verbose=False).input_ids[0, : 32 * 128].reshape(32, 128)
    data = [Example(story[at : at + 600]) for at in range(400_000, 409_600, 600)]

    def loss(step=None):
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        if step is not None:
            step.compress(model, Context(data=data, tokenizer=tokenizer, progress=False))
        with torch.inference_mode():
            return model(input_ids=held_out, labels=held_out).loss.item()

    fields = {"bits": 3, "group_size": 32, "compute": "float", "indivisible": "pad"}
    dense, rounded, aware = loss(), loss(lc.WeightOnlyQuantization(**fields)), loss(lc.AWQ(**fields))
    assert aware - dense < 0.6 * (rounded - dense)


# -- refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scales": False, "clip": False}, "AWQ.clip must be True with scales=False"),
        ({"symmetric": True, "fine_zeros": True}, "AWQ.fine_zeros must be False with symmetric=True"),
        ({"bits": 1}, r"AWQ.bits must be in \[2, 8\]"),
        ({"group_size": 7}, "AWQ.group_size must be a multiple of 8"),
        ({"n_grid": 0}, "AWQ.n_grid"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields, message):
    with pytest.raises(lc.ConfigError, match=message):
        lc.AWQ(**fields)


def test_damaged_and_unfit_inputs_are_refused():
    model = tiny_model("llama")
    with pytest.raises(lc.MissingInputError, match="calibration texts too short"):
        run(awq(), model, data=[Example("a"), Example("")])
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(lc.CompressionError, match=r"weights of model\.layers\.1\.mlp\.up_proj hold NaN"):
        awq().compress(model, texts(model))
    packed = lc.WeightOnlyQuantization().compress(tiny_model("llama"), Context())
    with pytest.raises(lc.UnsupportedModelError, match="already quantized"):
        awq().compress(packed, texts(packed))


@pytest.mark.parametrize("scales", [True, False])
def test_activations_that_are_not_finite_are_named(scales):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.inf
    with pytest.raises(lc.CompressionError, match=r"NaN or infinite activations enter model\.layers\.1\.self_attn"):
        awq(scales=scales).compress(model, texts(model))


@pytest.mark.parametrize(
    ("step", "folds"),
    [
        (awq(), True),
        (awq(scales=False), False),
        (lc.DynamicQuantization(smooth=0.5), True),
        (lc.DynamicQuantization(), False),
        (lc.StaticQuantization(smooth=0.5), True),
    ],
)
def test_plans_tell_that_scales_are_folded_into_other_tensors(step, folds):
    plan = step.plan(tiny_model("llama"), Context())
    assert any("divided by scales" in (action.reason or "") for action in plan if not action.path) is folds
