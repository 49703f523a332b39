"""What magnitude, Wanda and SparseGPT share: overrides, plans, counts, refusals; and each against a case by hand."""

import copy
import itertools

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.layers import select, weight_layers
from llmcompress.calibration import (
    InputNorms,
    InputProducts,
    block_by_block,
    calibration_batches,
    inverse_root,
    observe,
)
from llmcompress.compressor import Context
from llmcompress.data import Example
from llmcompress.pruning.allocation import owl_quotas, shares
from llmcompress.pruning.sparsegpt import reconstruct
from llmcompress.pruning.unstructured import Quota, lowest, matrices, zero_lowest
from llmcompress.testing import FAMILIES, tiny_data, tiny_model, tiny_tokenizer

ALL = [lc.MagnitudePruning, lc.WandaPruning, lc.SparseGPTPruning]
CALIBRATED = [lc.WandaPruning, lc.SparseGPTPruning]


def _compress(model, step, data=None):
    data = tiny_data(model) if data is None else data
    return lc.compress(model, step, data=data, tokenizer=tiny_tokenizer(), progress=False)


def _zeros(model):
    """Return the zeros of each matrix of the blocks, by name: one number, or one for each expert."""
    layers = [layer for layer in weight_layers(model) if layer.place == "block" and layer.kind in _KINDS]
    return {layer.name: [int((matrix == 0).sum()) for matrix in matrices(layer)] for layer in layers}


def _sizes(model):
    layers = [layer for layer in weight_layers(model) if layer.place == "block" and layer.kind in _KINDS]
    return {layer.name: [matrix.numel() for matrix in matrices(layer)] for layer in layers}


_KINDS = ("linear", "conv1d", "experts")


# How many zeros.


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cls", ALL)
def test_every_matrix_of_every_family_gets_exactly_its_share(cls, family):
    model = tiny_model(family)
    pruned = _compress(model, cls(sparsity=0.7)).model
    for layer in select(pruned, who="test", targets=None)[0]:
        count = sum(int((matrix == 0).sum()) for matrix in matrices(layer))
        # Calibrated strategies round for the matrix of each expert.
        parts = 1 if cls is lc.MagnitudePruning else len(matrices(layer))
        assert count == parts * round(0.7 * layer.weight.numel() / parts)


# In turns: each strategy prunes every family and to every pattern.
@pytest.mark.parametrize("cls", CALIBRATED)
@pytest.mark.parametrize(
    ("family", "pattern"), [("llama", "2:4"), ("gpt2", "5:8"), ("mixtral", "1:16"), ("mixtral", "2:4"), ("t5", "5:8")]
)
def test_n_of_m_is_exact_along_the_inputs(cls, family, pattern):
    n, m = map(int, pattern.split(":"))
    pruned = _compress(tiny_model(family), cls(pattern=pattern)).model
    for layer in select(pruned, who="test", targets=None)[0]:
        for matrix in matrices(layer):
            assert ((matrix.unflatten(-1, (-1, m)) != 0).sum(-1) == n).all()


@pytest.mark.parametrize("cls", ALL)
def test_overrides_decide_by_the_first_match(cls):
    overrides = {"*.layers.0.*.down_proj": 0.25, "*.down_proj": "1:4", "*.q_proj": 0, "*": 0.5}
    model = tiny_model("llama")
    result = _compress(model, cls(sparsity=0.9, overrides=overrides))
    sizes = _sizes(model)
    for name, [zeros] in _zeros(result.model).items():
        share = 0.25 if "layers.0.mlp.down" in name else 0.75 if "down" in name else 0 if "q_proj" in name else 0.5
        assert zeros == share * sizes[name][0], name
    left = {action.path: action.reason for action in result.report.steps[0].left}
    assert left["model.layers.1.self_attn.q_proj"] == "overrides['*.q_proj'] = 0"
    does = {action.path: action.does for action in result.report.steps[0].touched}
    assert does["model.layers.1.mlp.down_proj"] == "1:4 zeros"
    assert does["model.layers.0.mlp.down_proj"] == "0.25 of its weights zero"


def test_layers_with_an_override_do_not_compete_with_the_others():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(1e-3)
    pruned = _compress(model, lc.MagnitudePruning(sparsity=0.6, scope="global", overrides={"*.down_proj": 0.1})).model
    sizes, zeros = _sizes(model), _zeros(pruned)
    down = {name for name in zeros if "down_proj" in name}
    assert all(zeros[name][0] == round(0.1 * sizes[name][0]) for name in down)
    rest = sum(sizes[name][0] for name in zeros if name not in down)
    assert sum(zeros[name][0] for name in zeros if name not in down) == round(0.6 * rest)


@pytest.mark.parametrize("cls", ALL)
def test_the_plan_names_every_layer_and_what_zeros_do_not_give(cls):
    model = tiny_model("mixtral")
    step = cls(overrides={"*.k_proj": 0}, skip=("*.1.*.v_proj",))
    plan = step.plan(model, Context())
    assert {action.path for action in plan} - {""} == {layer.name for layer in weight_layers(model)}
    assert [action.reason for action in plan if action.path == ""] == [
        "zeros in dense tensors: 0 % smaller on disk, 0 % faster here by this step alone"
    ]
    assert all(action.reason for action in plan if not action.touched)


# Wanda.


def test_wanda_by_hand():
    # Two rows of four; the second input is the loudest, the last one silent.
    matrix = torch.tensor([[0.5, -0.1, 2.0, 9.0], [1.0, 0.2, -0.4, 0.3]])
    norms = InputNorms(4)
    norms.update(torch.tensor([[3.0, 30.0, 1.0, 0.0], [4.0, 40.0, 0.0, 0.0]]))
    assert norms.norms().tolist() == [5.0, 50.0, 1.0, 0.0]
    # |w| x ||x||: 2.5, 5, 2, 0 and 5, 10, 0.4, 0.
    zero_lowest(matrix, Quota(None, 0.5), norms.norms())
    assert matrix.tolist() == [[0.5, pytest.approx(-0.1), 0.0, 0.0], [1.0, pytest.approx(0.2), 0.0, 0.0]]


def test_wanda_compares_within_rows_and_on_pruned_inputs():
    model = tiny_model("qwen2")
    pruned = _compress(model, lc.WandaPruning(sparsity=0.375, inputs="pruned")).model
    batches = calibration_batches(
        model, Context(data=tiny_data(model), tokenizer=tiny_tokenizer()), who="test", samples=8, max_length=64
    )
    half = copy.deepcopy(model)
    half.model.layers[0].load_state_dict(pruned.model.layers[0].state_dict())
    for number, seen_by in enumerate((model, half)):
        layers = [layer for layer in select(model, who="test", targets=None)[0] if f".layers.{number}." in layer.name]
        own = {layer.name: layer for layer in weight_layers(seen_by)}
        norms = observe(seen_by, batches, [own[layer.name] for layer in layers], InputNorms.of, who="test")
        for layer in layers:
            scores = layer.weight.detach().abs() * norms[layer.name][0].norms()
            keep = scores >= scores.kthvalue(round(0.375 * scores.shape[1]) + 1, dim=1, keepdim=True).values
            assert torch.equal(pruned.get_submodule(layer.path).weight, layer.weight * keep)


# SparseGPT.


def _exact(matrix, products, keep):
    """Solve each row's least squares over the inputs that it keeps, in closed form."""
    solved = torch.zeros_like(matrix)
    for row, kept in enumerate(keep):
        inside = products[kept][:, kept]
        solved[row, kept] = torch.linalg.solve(inside, products[kept] @ matrix[row])
    return solved


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_sparsegpt_is_exact_where_one_column_goes_last_to_first(pattern):
    """Columns that go before all that stay are made up for exactly: the answer is the least squares solution."""
    torch.manual_seed(0)
    inputs = torch.randn(50, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    products = inputs.T @ inputs
    matrix = torch.tensor([[1e-3, -2e-3, 2.0, 3.0], [2e-3, 1e-3, -1.0, 2.0]])
    pruned = matrix.clone()
    root, dampening = inverse_root(products.float(), 1e-9, who="example")
    assert dampening == 1e-9
    reconstruct(pruned, root, Quota(None, 0.5, pattern), mask_block_size=4)
    keep = pruned != 0
    assert keep.tolist() == [[False, False, True, True]] * 2
    torch.testing.assert_close(pruned, _exact(matrix.double(), products, keep).float(), rtol=1e-4, atol=1e-5)


def test_sparsegpt_equals_obs_column_by_column():
    """Against the plain algorithm: the inverse of what is left, taken anew for every column, and no factor at all."""
    torch.manual_seed(1)
    inputs = torch.randn(40, 6, dtype=torch.float64)
    products, matrix = inputs.T @ inputs, torch.randn(3, 6)
    pruned, expected = matrix.clone(), matrix.double()
    root, _ = inverse_root(products.float(), 1e-9, who="example")
    reconstruct(pruned, root, Quota(None, 0.5), mask_block_size=2, block_size=4)
    for start in range(0, 6, 2):
        diagonal = [torch.linalg.inv(products[j:, j:])[0, 0] for j in (start, start + 1)]
        cost = expected[:, start : start + 2] ** 2 / torch.stack(diagonal)
        drop = torch.zeros(6, dtype=torch.bool)
        drop[cost.flatten().argsort()[:3]] = True
        for j, gone in zip((start, start + 1), drop.view(3, 2).T, strict=True):
            inverse = torch.linalg.inv(products[j:, j:])
            expected[:, j:] -= torch.outer(expected[:, j] * gone / inverse[0, 0], inverse[0])
            expected[gone, j] = 0
    torch.testing.assert_close(pruned, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(pruned == 0, expected == 0)


def test_sparsegpt_is_not_far_from_the_best_and_better_than_no_update():
    torch.manual_seed(2)
    inputs = torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64)
    products, matrix = inputs.T @ inputs, torch.randn(2, 4, dtype=torch.float64)

    def error(candidate):
        return float((inputs @ (candidate.double() - matrix).T).square().sum())

    masks = [torch.tensor(mask, dtype=torch.bool) for mask in itertools.product([0, 1], repeat=4) if sum(mask) == 2]
    best = min(error(_exact(matrix, products, torch.stack([a, b]))) for a in masks for b in masks)
    pruned, bare = matrix.float(), matrix.float()
    reconstruct(pruned, inverse_root(products.float(), 1e-6, who="example")[0], Quota(None, 0.5, (2, 4)))
    zero_lowest(bare, Quota(None, 0.5, (2, 4)), torch.tensor(products.diagonal().sqrt().tolist()))
    assert best <= error(pruned) < error(bare)


@pytest.mark.parametrize("block_size", [1, 3, 8, 100])
def test_the_lazy_update_changes_no_result(block_size):
    torch.manual_seed(0)
    matrix, inputs = torch.randn(5, 20), torch.randn(60, 20)
    root, _ = inverse_root(inputs.T @ inputs, 0.01, who="example")
    one, other = matrix.clone(), matrix.clone()
    reconstruct(one, root, Quota(None, 0.37), mask_block_size=3, block_size=20)
    reconstruct(other, root, Quota(None, 0.37), mask_block_size=3, block_size=block_size)
    torch.testing.assert_close(one, other)
    assert int((one == 0).sum()) == round(0.37 * 100)


def test_dampening_grows_until_there_is_a_factor():
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    products = inputs.T @ inputs  # of rank 3
    root, dampening = inverse_root(products, 1e-12, who="example")
    assert dampening > 1e-12
    damped = products.double() + dampening * products.double().diagonal().mean() * torch.eye(8)
    torch.testing.assert_close(root.double().T @ root.double(), torch.linalg.inv(damped), rtol=1e-3, atol=1e-3)
    with pytest.raises(lc.CompressionError, match="no Hessian that can be inverted"):
        inverse_root(-torch.eye(3) * torch.tensor([1.0, 1.0, 100.0]), 0.1, who="example")


def test_grown_dampening_is_told():
    model = tiny_model("llama")
    data = [Example("a cat sat on a mat and so on")] * 2  # fewer tokens than features
    result = _compress(model, lc.SparseGPTPruning(dampening=1e-14), data)
    told = [action.reason for action in result.report.steps[0].touched if action.reason]
    assert any(reason.startswith("dampening grew from 1e-14 to 1e-") for reason in told)
    quiet = _compress(model, lc.SparseGPTPruning(), data).report.steps[0]
    assert not [action for action in quiet.touched if action.reason]


def test_dead_inputs_go_first_and_disturb_nothing():
    torch.manual_seed(0)
    inputs = torch.randn(60, 8)
    inputs[:, [1, 6]] = 0
    matrix = torch.randn(4, 8).sign() + torch.randn(4, 8) / 10
    pruned = matrix.clone()
    root, dampening = inverse_root(inputs.T @ inputs, 0.01, who="example")
    assert dampening == 0.01
    reconstruct(pruned, root, Quota(None, 0.25), mask_block_size=8)
    assert torch.equal(pruned == 0, torch.tensor([False, True, False, False, False, False, True, False]).expand(4, 8))
    alive = [0, 2, 3, 4, 5, 7]
    torch.testing.assert_close(pruned[:, alive], matrix[:, alive])


def test_sparsegpt_is_closer_than_wanda_to_what_the_model_gave():
    model, tokenizer = tiny_model("qwen2"), tiny_tokenizer()
    words = ["cat", "dog", "sun", "moon", "tree", "stone", "river", "bird"]
    texts = [f"the {a} saw the {b} and the {c}" for a, b, c in itertools.permutations(words, 3)]
    batches = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts[::8]]

    def logits(candidate):
        with torch.inference_mode():
            return torch.cat([candidate(ids).logits[0] for ids in batches])

    data = [Example(text) for text in texts[1::2]]
    wanda, sparsegpt = (
        float((logits(_compress(model, cls(), data).model) - logits(model)).norm()) for cls in CALIBRATED
    )
    assert sparsegpt < 0.9 * wanda


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", ALL)
def test_half_precision_keeps_its_dtype_and_exact_zeros(cls, dtype):
    model = tiny_model("llama").to(dtype)
    pruned = _compress(model, cls()).model
    assert all(parameter.dtype == dtype for parameter in pruned.parameters())
    assert _zeros(pruned) == {name: [size // 2 for size in sizes] for name, sizes in _sizes(model).items()}


# What no token reaches.


@pytest.mark.parametrize("cls", CALIBRATED)
def test_experts_that_no_token_reaches_go_by_magnitude_and_are_told(cls):
    model = tiny_model("mixtral")
    for block in model.model.layers:
        block.mlp.gate.weight.data.zero_()  # ties: the same two experts for every token
    result = _compress(model, cls(sparsity=0.25, inputs="pruned"))
    batches = calibration_batches(
        model, Context(data=tiny_data(model), tokenizer=tiny_tokenizer()), who="test", samples=8, max_length=64
    )
    layers = select(model, who="test", targets=("*experts*",))[0]
    told = {action.path: action.reason for action in result.report.steps[0].touched if action.reason}
    pruned = {layer.name: layer for layer in weight_layers(result.model)}
    for turn in block_by_block(model, batches, layers, InputNorms.of, who="test"):
        for name, statistics in turn.statistics.items():
            cold = [number for number, one in enumerate(statistics) if not one.count]
            assert len(cold) == 2
            where = ", ".join(map(str, cold))
            assert told[name] == f"experts {where}: pruned by magnitude: no calibration token reached it"
            before = next(layer for layer in layers if layer.name == name)
            for number in cold:
                expected = matrices(before)[number].clone()
                zero_lowest(expected, Quota(None, 0.25))
                assert torch.equal(matrices(pruned[name])[number], expected)


@pytest.mark.parametrize("cls", CALIBRATED)
def test_a_layer_whose_inputs_are_all_zero_goes_by_magnitude_and_is_told(cls):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.zero_()
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    result = _compress(model, cls())
    [told] = [action for action in result.report.steps[0].touched if action.reason]
    assert told.path == "model.layers.1.mlp.down_proj"
    assert told.reason == "pruned by magnitude: its inputs were zero on every calibration token"
    zero_lowest(before, Quota(None, 0.5))
    assert torch.equal(result.model.model.layers[1].mlp.down_proj.weight, before)


# OWL.


def test_shares_keep_the_mean_and_the_spread():
    ratios, sizes = [0.02, 0.05, 0.01, 0.03], [100, 300, 50, 700]
    found = shares(ratios, sizes, 0.6, 0.1)
    assert sum(share * size for share, size in zip(found, sizes, strict=True)) / sum(sizes) == pytest.approx(0.6)
    assert max(abs(share - 0.6) for share in found) == pytest.approx(0.1)
    assert sorted(found) == [found[1], found[3], found[0], found[2]]
    assert shares([0.0, 0.0], [1, 2], 0.6, 0.1) == [0.6, 0.6]


def test_owl_counts_outliers_over_a_whole_block():
    model = tiny_model("llama")
    with torch.no_grad():
        for layer in weight_layers(model):
            if ".layers.1." in layer.name and layer.kind == "linear":
                layer.weight.view(-1)[::50] *= 30  # outliers in the second block
    context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer())
    batches = calibration_batches(model, context, who="test", samples=8, max_length=64)
    layers = select(model, who="test", targets=None)[0]
    quotas = [Quota(layer, 0.6, own="q_proj" in layer.name) for layer in layers]
    norms = observe(model, batches, layers, InputNorms.of, who="test")
    ratios = []
    for block in ("layers.0.", "layers.1."):
        inside = [layer for layer in layers if block in layer.name and "q_proj" not in layer.name]
        scores = torch.cat([(layer.weight.abs() * norms[layer.name][0].norms()).flatten() for layer in inside])
        ratios.append(float((scores > 5 * scores.mean()).double().mean()))
    assert ratios[1] > ratios[0]
    found = owl_quotas(model, batches, quotas, 0.6, 5.0, 0.08, who="test")
    for quota in found:
        expected = 0.6 if quota.own else 0.68 if ".layers.0." in quota.layer.name else 0.52
        assert quota.sparsity == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("family", ["llama", "t5", "mixtral"])
@pytest.mark.parametrize("cls", CALIBRATED)
def test_owl_keeps_the_mean_and_is_told(cls, family):
    model = tiny_model(family)
    result = _compress(model, cls(sparsity=0.6, allocation="owl"))
    zeros, sizes = _zeros(result.model), _sizes(model)
    total = sum(sum(sizes[name]) for name in sizes)
    found = {name: sum(zeros[name]) / sum(sizes[name]) for name in sizes}
    assert sum(found[name] * sum(sizes[name]) for name in sizes) / total == pytest.approx(0.6, abs=5e-3)
    assert all(0.51 < share < 0.69 for share in found.values())
    assert max(found.values()) - min(found.values()) > 0.05
    told = [action for action in result.report.steps[0].touched if action.reason]
    assert {action.path for action in told} == set(sizes)


# Refusals: one clear error each, before work, and the model untouched.


@pytest.mark.parametrize("cls", ALL)
def test_bad_fields_are_refused(cls):
    who = cls.__name__
    with pytest.raises(lc.ConfigError, match=rf"{who}\.sparsity must be in \(0, 1\), got 1\.5"):
        cls(sparsity=1.5)
    with pytest.raises(lc.ConfigError, match=rf"{who}\.pattern must be 'N:M' with 0 < N < M.*got '4:4'"):
        cls(pattern="4:4")
    with pytest.raises(lc.ConfigError, match=rf"{who}\.overrides\['a'\] must be in \[0, 1\) or 'N:M', got 1\.0"):
        cls(overrides={"a": 1.0})
    with pytest.raises(lc.ConfigError, match=rf"{who}\.overrides\['a'\] must be 'N:M'.*got '2'"):
        cls(overrides={"a": "2"})


@pytest.mark.parametrize("cls", CALIBRATED)
def test_bad_allocations_are_refused(cls):
    with pytest.raises(lc.ConfigError, match=r"allocation must be 'uniform' with a pattern"):
        cls(pattern="2:4", allocation="owl")
    with pytest.raises(lc.ConfigError, match=r"owl_lambda must be below 0\.05 with sparsity=0\.95.*got 0\.08"):
        cls(sparsity=0.95, allocation="owl")
    with pytest.raises(lc.ConfigError, match=r"samples must be in \[1, inf\), got 0"):
        cls(samples=0)


def _untouched(model, step, error, match, **inputs):
    before = copy.deepcopy(model.state_dict())
    inputs = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), **inputs}
    with pytest.raises(error, match=match):
        lc.compress(model, step, inplace=True, progress=False, **inputs)
    same = (torch.equal(tensor.nan_to_num(), before[name].nan_to_num()) for name, tensor in model.state_dict().items())
    assert all(same)
    assert model.training is False


@pytest.mark.parametrize("cls", ALL)
def test_bad_models_are_refused_untouched(cls):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=98)).eval()
    who = cls.__name__
    match = rf"{who}\.pattern='2:4' must divide.*down_proj has 98; leave it out with skip=\('model\.layers\.0"
    _untouched(model, cls(pattern="2:4"), lc.ConfigError, match)
    match = rf"{who}\.overrides\['\*\.down_proj'\]='1:4' must divide.*down_proj has 98"
    _untouched(model, cls(overrides={"*.down_proj": "1:4"}), lc.ConfigError, match)
    match = r"no layer that .* works on in LlamaForCausalLM matches .*\.overrides\['\*\.nope'\]"
    _untouched(model, cls(overrides={"*.nope": 0.5}), lc.NothingToCompressError, match)
    _untouched(model, cls(overrides={"*": 0}), lc.NothingToCompressError, r"overrides\['\*'\] = 0")
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    _untouched(model, cls(), lc.CompressionError, r"weights of bert\.encoder\.layer\.1\.output\.dense hold NaN")


@pytest.mark.parametrize("allocation", ["uniform", "owl"])
@pytest.mark.parametrize("cls", CALIBRATED)
def test_bad_activations_and_texts_are_refused_untouched(cls, allocation):
    model = tiny_model("llama")
    step = cls(allocation=allocation)
    _untouched(model, step, lc.MissingInputError, "calibration texts too short", data=["ab", "c"])
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = float("nan")
    match = r"NaN or infinite activations enter model\.layers\.0\.self_attn\.q_proj"
    _untouched(model, step, lc.CompressionError, match)


def test_lowest_is_exact_among_ties():
    assert lowest(torch.ones(3, 10), torch.tensor([3, 0, 10])).sum(-1).tolist() == [3, 0, 10]


def test_products_are_what_sparsegpt_takes():
    layer = next(layer for layer in weight_layers(tiny_model("gpt2")) if layer.kind == "conv1d")
    assert InputProducts.of(layer).products.shape == (64, 64)


@pytest.mark.parametrize("family", ["bert", "gpt2", "mixtral"])
def test_dense_inputs_are_those_of_the_whole_model(family):
    """Every layer, the later ones too, is ranked by what it gets in the model before any pruning."""
    model = tiny_model(family)
    context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer())
    step = lc.WandaPruning(inputs="dense")
    batches = calibration_batches(model, context, who="test", samples=step.samples, max_length=step.max_length)
    layers = select(model, who="test", targets=None)[0]
    seen = observe(model, batches, layers, InputNorms.of, who="test")
    expected = {}
    for layer in layers:
        parts = zip(matrices(layer), seen[layer.name], strict=True)
        expected[layer.name] = [
            lowest(matrix.abs() * part.norms(), torch.full((len(matrix),), matrix.shape[1] // 2))
            for matrix, part in parts
        ]
    dense, pruned = (_compress(model, lc.WandaPruning(inputs=inputs)).model for inputs in ("dense", "pruned"))
    for layer in select(dense, who="test", targets=None)[0]:
        for matrix, gone in zip(matrices(layer), expected[layer.name], strict=True):
            assert torch.equal(matrix == 0, gone)
    assert any(not torch.equal(a, b) for a, b in zip(dense.parameters(), pruned.parameters(), strict=True))
