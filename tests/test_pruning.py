import pytest
import torch

import llmcompress as lc
from llmcompress.pruning.magnitude import zero_smallest
from llmcompress.testing import tiny_model


def _compress(model, step):
    return lc.compress(model, step, progress=False)


def test_zero_smallest_is_exact_across_layers_and_dtypes():
    torch.manual_seed(0)
    weights = [torch.randn(40, 33), torch.randn(7, 5) * 0.1, torch.randn(64).bfloat16()]
    values = torch.cat([weight.float().flatten() for weight in weights]).abs().sort().values
    count = round(0.37 * len(values))
    zero_smallest(weights, 0.37)
    assert sum(int((weight == 0).sum()) for weight in weights) == count
    kept = torch.cat([weight.float().flatten() for weight in weights]).abs()
    assert kept[kept > 0].min() >= values[count - 1]


def test_ties_are_broken_to_the_exact_count():
    weight = torch.ones(10, 10)
    zero_smallest([weight], 0.33)
    assert int((weight == 0).sum()) == 33


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_sparsity_is_reached(scope):
    pruned = _compress(tiny_model("llama"), lc.MagnitudePruning(sparsity=0.6, scope=scope)).model
    weights = [layer.weight for layer in pruned.model.layers.modules() if isinstance(layer, torch.nn.Linear)]
    shares = [float((weight == 0).float().mean()) for weight in weights]
    total = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert total == pytest.approx(0.6, abs=1e-3)
    assert (max(shares) - min(shares) < 2e-3) == (scope == "layer")


@pytest.mark.parametrize(
    ("family", "pattern"),
    [
        *(("llama", pattern) for pattern in ("2:4", "4:8", "1:4", "7:16", "1:2")),
        *((family, pattern) for family in ("gpt2", "mixtral", "phi3") for pattern in ("2:4", "7:16")),
    ],
)
def test_patterns_hold_along_the_inputs(family, pattern):
    from llmcompress.anatomy.layers import weight_layers

    n, m = map(int, pattern.split(":"))
    pruned = _compress(tiny_model(family), lc.MagnitudePruning(pattern=pattern)).model
    for layer in weight_layers(pruned):
        if layer.place == "block" and layer.kind not in ("embedding", "other"):
            groups = layer.weight.movedim(layer.input_axis, -1).unflatten(-1, (-1, m))
            assert ((groups != 0).sum(-1) == n).all()


def test_magnitude_refusals():
    with pytest.raises(lc.ConfigError, match=r"sparsity must be 0\.5 .*got 0\.7"):
        lc.MagnitudePruning(pattern="2:4", sparsity=0.7)
    with pytest.raises(lc.ConfigError, match="scope must be 'layer'"):
        lc.MagnitudePruning(pattern="2:4", scope="global")
    for wrong in ("4:2", "0:4", "4:4", "2-4", "2:4:8", "", "a:b"):
        with pytest.raises(lc.ConfigError, match=r"pattern must be 'N:M' with 0 < N < M"):
            lc.MagnitudePruning(pattern=wrong)
    with pytest.raises(lc.ConfigError, match=r"pattern must be"):
        lc.MagnitudePruning(pattern=2)
    for wrong in (1.5, 0, 1, -0.1, float("nan"), float("inf"), "much", None):
        with pytest.raises(lc.ConfigError, match="sparsity must be"):
            lc.MagnitudePruning(sparsity=wrong)


def test_a_group_that_does_not_divide_is_refused_with_the_way_out():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=98
    )
    with pytest.raises(lc.ConfigError, match=r"down_proj has 98; leave it out with skip=\('model\.layers\.0"):
        _compress(LlamaForCausalLM(config), lc.MagnitudePruning(pattern="2:4"))
    done = _compress(LlamaForCausalLM(config), lc.MagnitudePruning(pattern="2:4", skip=("*.down_proj",)))
    assert any("skip=" in action.reason for action in done.report.steps[0].left)


@pytest.mark.parametrize("step", [lc.MagnitudePruning(), lc.StructuredPruning()])
def test_nan_weights_are_named(step):
    model = tiny_model("bert")
    with torch.no_grad():
        model.bert.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(lc.CompressionError, match=r"encoder\.layer\.1.*NaN"):
        _compress(model, step)


def test_the_sparsity_follows_from_the_pattern():
    step = lc.MagnitudePruning(pattern="1:4")
    assert step.sparsity == 0.75
    assert lc.compressors.create(step.to_dict()) == step
    assert lc.MagnitudePruning(pattern="1:3", sparsity=2 / 3).sparsity == 2 / 3


def test_chunks_and_layouts_change_nothing(monkeypatch):
    from llmcompress.pruning import unstructured

    torch.manual_seed(0)
    weights = [torch.randn(3, 17, 9), torch.randn(11, 30).T, torch.randn(5)]
    whole, parts = [weight.clone() for weight in weights], [weight.clone() for weight in weights]
    zero_smallest(whole, 0.4)
    monkeypatch.setattr(unstructured, "_CHUNK", 20)
    zero_smallest(parts, 0.4)
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))
