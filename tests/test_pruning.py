import copy

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.footprint import footprint
from llmcompress.anatomy.probe import probe_outputs, relative_error
from llmcompress.pruning.importance import channel_magnitude
from llmcompress.pruning.magnitude import zero_smallest
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model


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


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "phi3"])
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_hold_along_the_inputs(family, pattern):
    from llmcompress.anatomy.layers import weight_layers

    n, m = map(int, pattern.split(":"))
    pruned = _compress(tiny_model(family), lc.MagnitudePruning(pattern=pattern)).model
    for layer in weight_layers(pruned):
        if layer.place == "block" and layer.kind not in ("embedding", "other"):
            groups = layer.weight.movedim(layer.input_axis, -1).unflatten(-1, (-1, m))
            assert ((groups != 0).sum(-1) <= n).all()


def test_magnitude_refusals():
    with pytest.raises(lc.ConfigError, match=r"sparsity must be 0\.5 .*got 0\.7"):
        lc.MagnitudePruning(pattern="2:4", sparsity=0.7)
    with pytest.raises(lc.ConfigError, match="scope must be 'layer'"):
        lc.MagnitudePruning(pattern="2:4", scope="global")
    with pytest.raises(lc.ConfigError, match="must be '2:4' or '4:8'"):
        lc.MagnitudePruning(pattern="3:4")
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


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_equals_sliced_equals_reloaded(family, tmp_path):
    model, inputs = tiny_model(family), None
    inputs = tiny_inputs(model)
    step = lc.StructuredPruning(ffn=0.4, round_to=1)
    result = _compress(model, step)
    context = lc.Context()
    masked = copy.deepcopy(model)
    from llmcompress.anatomy import anatomy
    from llmcompress.anatomy.surgery import zero_channels

    step.compress(copy.deepcopy(model), context)
    cuts = {cut.path: cut for cut in context.history}
    for network in anatomy(masked).feed_forwards():
        cut = cuts.get(network.path) or [cuts[f"{network.path}.{i}"] for i in range(4)]
        drops = [sorted(set(range(c.of)) - set(c.kept)) for c in (cut if isinstance(cut, list) else [cut])]
        zero_channels(network, torch.tensor(drops if isinstance(cut, list) else drops[0]))
    sliced = probe_outputs(result.model, inputs)
    assert relative_error(sliced, probe_outputs(masked, inputs)) < 1e-5
    assert footprint(result.model).parameters < footprint(model).parameters
    result.model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(probe_outputs(reloaded, inputs), sliced)
    assert "quantization_config" not in reloaded.config.to_dict()


def test_the_weakest_channels_go():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] *= 1e-3
        model.model.layers[0].mlp.gate_proj.weight[::2] *= 1e-3
        model.model.layers[0].mlp.down_proj.weight[:, ::2] *= 1e-3
    context = lc.Context()
    lc.StructuredPruning(ffn=0.5).compress(model, context)
    assert context.history[0].kept == tuple(range(1, 128, 2))


def test_channel_magnitude_by_hand():
    from llmcompress.anatomy import anatomy

    model = tiny_model("bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        for weight in (layer.intermediate.dense.weight, layer.output.dense.weight):
            weight.fill_(1.0)
        layer.intermediate.dense.weight[3] = 0
    scores = channel_magnitude(anatomy(model).feed_forwards()[0])
    up = 64 * torch.ones(128) / (127 / 128)
    up[3] = 0
    assert torch.allclose(scores, (up + 64).sqrt())


def test_round_to_and_its_refusals():
    assert (
        _compress(tiny_model("bert"), lc.StructuredPruning(ffn=0.3, round_to=32)).model.config.intermediate_size == 96
    )
    with pytest.raises(lc.NothingToCompressError, match="lower round_to or raise ffn"):
        _compress(tiny_model("bert"), lc.StructuredPruning(ffn=0.1, round_to=64))


def test_what_a_config_cannot_tell_is_refused_before_work():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=64, n_layer=2, n_head=4))
    with pytest.raises(lc.UnsupportedModelError, match="FFN width of BloomForCausalLM cannot be changed"):
        _compress(model, lc.StructuredPruning())


def test_encoder_and_decoder_widths_of_their_own():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=128,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    pruned = _compress(BartForConditionalGeneration(config), lc.StructuredPruning(ffn=0.5)).model
    assert (pruned.config.encoder_ffn_dim, pruned.config.decoder_ffn_dim) == (32, 64)
