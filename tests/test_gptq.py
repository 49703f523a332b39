"""GPTQ: by hand, against optimal brain surgery step by step, what refines it, and the strategy on tiny models."""

import copy
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.layers import weight_layers
from llmcompress.calibration import calibration_batches
from llmcompress.calibration.hessian import damped_root
from llmcompress.data import Example
from llmcompress.quantization.fitting import fit, quantize
from llmcompress.quantization.gptq_rounding import lay_again, output_error, round_again, round_with_feedback
from llmcompress.quantization.grid import Coded, Grid, decode, encode, min_max
from llmcompress.quantization.packed_modules import PackedEmbedding, PackedLinear
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


def problem(rows=5, columns=24, tokens=60, seed=0):
    """Weights, and the products of inputs that go together; float64 products."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return torch.randn(rows, columns, generator=generator), (inputs.T @ inputs).double() / tokens


def by_surgery(weight, hessian, laid, grid, order):
    """Optimal brain surgery (arXiv 2208.11580), one column at a time, with the inverse of what is left each time."""
    left, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    free = list(order)
    while free:
        column = free[0]
        inverse = torch.linalg.inv(hessian[free][:, free])
        own = encode(left.float(), *laid, grid)[:, column]
        codes[:, column] = own
        all_codes = encode(left.float(), *laid, grid)
        value = decode(Coded(all_codes, *laid), grid)[:, column].double()
        error = (left[:, column] - value) / inverse[0, 0]
        left[:, free] -= error[:, None] * inverse[0]
        free = free[1:]
    return codes


def context_of(model, **fields):
    return lc.Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False, **fields)


def quantized(model, context=None, **fields):
    context = context or context_of(model)
    return lc.GPTQ(**{"group_size": 32, "compute": "float", **fields}).compress(copy.deepcopy(model), context)


def packed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLinear)}


# -- the rounding -------------------------------------------------------------------------------------------------


def test_two_columns_by_hand():
    # 0.4 goes to 0, and its error asks 0.9 x 0.4 of the second, whose own 0.3 would have gone to 0.
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    weight, grid = torch.tensor([[0.4, 0.3]]), Grid(2, None, scale_dtype=torch.float32)
    laid = (torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.uint8))
    root, dampening = damped_root(hessian, 1e-12, who="test")
    assert dampening == 1e-12
    assert round_with_feedback(weight, root, laid, grid).codes.tolist() == [[0, 1]]
    # The other way round 0.3 goes to 0 first, and 0.4 + 0.27 to 1.
    turned = torch.tensor([1, 0])
    root, _ = damped_root(hessian[turned][:, turned], 1e-12, who="test")
    assert round_with_feedback(weight, root, laid, grid, order=turned).codes.tolist() == [[1, 0]]


@pytest.mark.parametrize("grid", [Grid(3, 8), Grid(4, None, symmetric=True), Grid(2, 16, zero_bits=8)])
@pytest.mark.parametrize("block_size", [1, 5, 64])
def test_it_is_optimal_brain_surgery_in_a_fixed_order(grid, block_size):
    weight, hessian = problem()
    laid = min_max(weight, grid)
    order = hessian.diagonal().argsort(descending=True)
    root, _ = damped_root(hessian[order][:, order], 1e-12, who="test")
    found = round_with_feedback(weight, root, laid, grid, order=order, block_size=block_size)
    assert torch.equal(found.codes, by_surgery(weight, hessian, laid, grid, order.tolist()))
    assert torch.equal(found.scale, laid[0])


@pytest.mark.parametrize("how", ["min_max", "mse", "hqq"])
@pytest.mark.parametrize("grid", [Grid(3, 8), Grid(3, 16, symmetric=True), Grid(2, 16, zero_bits=8), Grid(4, None)])
def test_each_step_lowers_the_error_of_the_outputs(grid, how):
    weight, hessian = problem(rows=32)
    damped = (hessian + 0.01 * hessian.diagonal().mean() * torch.eye(24)).float()
    root, _ = damped_root(hessian, 0.01, who="test")
    plain = quantize(weight, grid, how)
    coded = round_with_feedback(weight, root, (plain.scale, plain.zero), grid)
    errors = [output_error(weight, damped, one, grid) for one in (plain, coded)]
    assert errors[1].sum() < 0.8 * errors[0].sum()
    for _ in range(2):
        for step in (round_again, lay_again):
            coded = step(weight, damped, coded, grid)
            errors.append(output_error(weight, damped, coded, grid))
            assert bool((errors[-1] <= errors[-2] * (1 + 1e-4)).all())
    assert errors[-1].sum() < 0.9 * errors[1].sum()
    assert coded.scale.dtype == grid.scale_dtype
    assert coded.codes.max() <= grid.limit


def test_scales_laid_again_are_those_of_least_squares():
    weight, hessian = problem(rows=3, columns=16)
    grid = Grid(4, 8, scale_dtype=torch.float32)
    coded = quantize(weight, grid)
    found = lay_again(weight, hessian.float(), coded, grid)
    unit = decode(Coded(coded.codes, torch.ones_like(coded.scale), coded.zero), grid).double()
    for row in range(3):
        basis = torch.zeros(16, 2, dtype=torch.float64)
        basis[:8, 0], basis[8:, 1] = unit[row, :8], unit[row, 8:]
        expected = torch.linalg.solve(basis.T @ hessian @ basis, basis.T @ hessian @ weight[row].double())
        torch.testing.assert_close(found.scale[row].double(), expected, rtol=1e-4, atol=1e-6)


def test_a_group_of_zeros_and_a_short_last_group():
    weight, hessian = problem(rows=4, columns=20)
    weight[:, 8:16] = 0
    grid = Grid(3, 8)
    root, _ = damped_root(hessian, 0.01, who="test")
    coded = round_with_feedback(weight, root, fit(weight, grid), grid)
    for _ in range(2):
        coded = round_again(weight, hessian.float(), lay_again(weight, hessian.float(), coded, grid), grid)
    assert torch.isfinite(coded.scale).all()
    assert coded.scale.shape == (4, 3)
    plain = quantize(weight, grid)
    errors = [output_error(weight, hessian.float(), one, grid).sum() for one in (coded, plain)]
    assert errors[0] < errors[1]


def test_zeros_that_must_stay_stay_and_the_others_make_up_for_them():
    weight, hessian = problem(rows=16)
    zeros = torch.zeros_like(weight, dtype=torch.bool)
    zeros.view(16, -1, 4)[:, :, 1:3] = True
    weight[zeros] = 0
    root, _ = damped_root(hessian, 0.01, who="test")
    for grid in (Grid(3, 8), Grid(3, 8, symmetric=True)):
        plain = quantize(weight, grid)
        coded = round_with_feedback(weight, root, (plain.scale, plain.zero), grid, zeros=zeros)
        coded = round_again(weight, hessian.float(), coded, grid, zeros=zeros)
        assert not decode(coded, grid)[zeros].any()
        assert decode(coded, grid)[~zeros].any()
        errors = [output_error(weight, hessian.float(), one, grid).sum() for one in (coded, plain)]
        assert errors[0] < errors[1]


# -- the strategy -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "t5", "mixtral"])
def test_outputs_are_nearer_than_those_of_rounding(family):
    model = tiny_model(family)
    context = context_of(model)
    ours = quantized(model, context, bits=3)
    rounding = lc.WeightOnlyQuantization(bits=3, group_size=32, compute="float", fine_zeros=True)
    plain = rounding.compress(copy.deepcopy(model), context)
    assert {name: layer.spec() for name, layer in packed(ours).items()} == {
        name: layer.spec() for name, layer in packed(plain).items()
    }
    batches = calibration_batches(model, context, who="test", samples=128, max_length=512)
    errors = torch.zeros(2)
    with torch.no_grad():
        for batch in batches:
            exact, near, far = (one.eval()(**batch)[0] for one in (model, ours, plain))
            errors += torch.stack([(near - exact).square().sum(), (far - exact).square().sum()])
    assert errors[0] < errors[1]


def test_the_order_of_rounding_does_not_show_in_the_layout():
    model = tiny_model("llama")
    one, other = (quantized(model, act_order=order).state_dict() for order in (True, False))
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in one.items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in other.items()
    }
    codes = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(one[codes], other[codes])


def test_the_block_size_changes_no_code():
    model = tiny_model("llama")
    one, other = (quantized(model, block_size=size).state_dict() for size in (7, 128))
    # Sums in another order: a weight in the very middle of two levels may go either way.
    codes = [
        torch.cat([state[name].flatten() for name in state if name.endswith("proj.weight")]) for state in (one, other)
    ]
    assert (codes[0] != codes[1]).float().mean() < 0.02


def test_layers_see_what_the_quantized_ones_before_them_put_out():
    model = tiny_model("llama")
    states = [
        quantized(model, bits=2, **fields).state_dict()
        for fields in ({"true_sequential": True}, {}, {"inputs": "dense"})
    ]
    first, second = "model.layers.0.self_attn.{}_proj.weight", "model.layers.1.self_attn.q_proj.weight"
    for state in states[1:]:
        assert torch.equal(states[0][first.format("q")], state[first.format("q")])
        assert not torch.equal(states[0][first.format("o")], state[first.format("o")])
    assert torch.equal(states[1][first.format("o")], states[2][first.format("o")])
    assert not torch.equal(states[1][second], states[2][second])


def test_dampening_that_grew_is_told():
    model = tiny_model("llama")
    context = lc.Context(data=tiny_data(model)[:4], tokenizer=tiny_tokenizer(), progress=False)
    found = quantized(model, context, dampening=1e-12)
    told = {action.path: action.reason for action in context.told}
    assert "dampening grew from 1e-12 to" in told["model.layers.0.mlp.down_proj"]
    assert all(torch.isfinite(layer.scale).all() for layer in packed(found).values())


def test_activations_that_are_not_finite_are_refused_with_the_layer():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.inf
    with pytest.raises(lc.CompressionError, match=r"activations enter model\.layers\.1\.self_attn\.\w_proj"):
        quantized(model)


def test_no_tokens_are_refused():
    model = tiny_model("llama")
    for data, tokenizer in ((None, tiny_tokenizer()), ([Example(text="")], tiny_tokenizer())):
        with pytest.raises(lc.MissingInputError, match="GPTQ"):
            lc.compress(model, lc.GPTQ(group_size=32), data=data, tokenizer=tokenizer, progress=False)


def test_fine_zeros_and_symmetric_exclude_each_other():
    with pytest.raises(lc.ConfigError, match=r"GPTQ\.fine_zeros must be False with symmetric=True"):
        lc.GPTQ(symmetric=True, fine_zeros=True)
    layer = packed(quantized(tiny_model("llama"), fine_zeros=True))["model.layers.0.mlp.up_proj"]
    assert layer.grid.zero_bits == 8


@pytest.mark.parametrize(
    ("family", "fields"),
    [("llama", {}), ("llama", {"symmetric": True}), ("llama", {"fine_zeros": True}), ("mixtral", {})],
)
def test_zeros_of_a_pruned_model_stay(family, fields):
    model = tiny_model(family)
    context = context_of(model)
    pruned = lc.SparseGPTPruning(pattern="2:4").compress(copy.deepcopy(model), context)
    context.told.clear()
    zeros = {layer.name: layer.weight == 0 for layer in weight_layers(pruned) if layer.place == "block"}
    found = quantized(pruned, context, **fields)
    back = lc.dequantize(found)
    for layer in weight_layers(back):
        if layer.place == "block" and layer.kind in ("linear", "experts") and zeros[layer.name].float().mean() > 0.4:
            assert not layer.weight[zeros[layer.name]].any()
            assert any(a.path == layer.name and "its zeros stay, 0.5 of its weights" in a.reason for a in context.told)


def test_the_report_counts_zeros_that_stay_and_each_layer_once():
    model = tiny_model("llama")
    steps = [lc.SparseGPTPruning(pattern="2:4"), lc.GPTQ(group_size=32)]
    report = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False).report
    pruned, packed_ = report.steps
    assert packed_.footprint.zeros >= pruned.footprint.zeros > 0.3
    lines = [action for action in packed_.touched if action.path == "model.layers.0.mlp.up_proj"]
    assert [(line.does, "its zeros stay" in line.reason) for line in lines] == [
        ("int4, groups of 32: 4.62 bits a weight", True)
    ]
    assert len(packed_.touched) == 14


def test_experts_that_no_token_reached_are_rounded_and_told():
    model = tiny_model("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data[3] = 0
        block.mlp.gate.weight.data[:3] *= 0
    context = context_of(model)
    quantized(model, context)
    told = [action for action in context.told if "no calibration token reached it" in action.reason]
    assert {action.path for action in told} == {
        f"model.layers.{block}.mlp.experts.{name}" for block in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    assert all(action.reason.startswith("experts ") and action.does.startswith("int4") for action in told)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_heads_are_calibrated_and_tables_go_with_them_or_are_rounded(family):
    model = tiny_model(family)
    tied = model.config.tie_word_embeddings
    name = "shared" if family == "t5" else "model.embed_tokens"
    step = lc.GPTQ(group_size=32, compute="float", overrides={"lm_head": 8, name: 8})
    plan = {action.path: action for action in step.plan(model, context_of(model))}
    found = step.compress(copy.deepcopy(model), context_of(model))
    table = found.get_input_embeddings()
    assert isinstance(table, PackedEmbedding)
    assert isinstance(found.get_output_embeddings(), PackedLinear)
    assert (table.weight is found.get_output_embeddings().weight) == tied
    exact = quantize(model.get_input_embeddings().weight, table.grid)
    assert torch.equal(table.coded().codes, exact.codes) != tied
    assert (plan[name].reason is not None and "tokens" in plan[name].reason) != tied


@pytest.mark.parametrize(
    ("family", "fields"), [("llama", {}), ("gpt2", {"overrides": {"lm_head": 8}, "inputs": "dense"})]
)
def test_a_checkpoint_bigger_than_memory_ends_with_the_same_codes(family, fields, tmp_path):
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "in")
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    step = lc.GPTQ(group_size=32, **fields)
    data = tiny_data(model)
    lc.compress_checkpoint(tmp_path / "in", tmp_path / "out", step, data=data, progress=False)
    expected = lc.compress(model, step, data=data, tokenizer=tiny_tokenizer(), progress=False).model.state_dict()
    found = type(model).from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.assets
def test_a_trained_llama_loses_less_than_by_the_reference():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "babyllama-tok105-hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = next((ASSETS / "tinystories").glob("*.txt")).read_text().replace("\n\n", "\n")
    texts = [text[400_000 + i * 1200 : 400_000 + (i + 1) * 1200] for i in range(64)]
    ids = (
        tokenizer(text[:100_000], return_tensors="pt", add_special_tokens=False).input_ids[0, : 60 * 256].view(60, 256)
    )
    step = lc.GPTQ(bits=3, group_size=32, compute="float", samples=64, max_length=256)
    found = lc.compress(model, step, data=texts, tokenizer=tokenizer, progress=False).model
    with torch.no_grad():
        logits = found(input_ids=ids).logits[:, :-1].flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten()).item()
    assert loss < 0.8128
