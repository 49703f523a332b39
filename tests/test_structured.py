"""Structured pruning: what is cut equals what is masked, and what was predicted is what comes out."""

import copy

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy import anatomy
from llmcompress.anatomy.coupling import feed_forward_groups, head_groups, query_head_groups
from llmcompress.anatomy.footprint import footprint
from llmcompress.anatomy.groups import cut, new_shapes, silence
from llmcompress.anatomy.masking import masked
from llmcompress.anatomy.probe import probe_outputs, relative_error
from llmcompress.anatomy.sizes import shapes_of
from llmcompress.pruning.importance import Evidence, score_groups
from llmcompress.pruning.selection import dearest, shared_out
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model

# Families whose config tells a number of heads; in the others the size of a head follows from it.
HEADS_IN_CONFIG = ("llama", "qwen2", "qwen3", "phi3", "mixtral", "t5")
GROUPED = ("llama", "qwen2", "qwen3", "gemma", "phi3", "mixtral")


def _compress(model, step):
    return lc.compress(model, step, progress=False)


def _parameters(shapes):
    return sum(torch.Size(shape).numel() for shape in shapes.values())


def _check(model, step, folder):
    """Mask a copy by the history, compare with the slice and with what is loaded; the prediction is exact."""
    inputs = tiny_inputs(model)
    predicted = step.predicted_shapes(model)
    context = lc.Context()
    pruned = step.compress(copy.deepcopy(model), context)
    sliced = probe_outputs(pruned, inputs)
    twin = copy.deepcopy(model)
    kept = {(entry.path, entry.axis): torch.tensor(entry.kept) for entry in context.history}
    cuts = []
    for group in step._widths(twin).groups:
        if group.experts:
            keep = torch.stack([kept[f"{group.path}.{expert}", group.kind] for expert in range(group.experts)])
        else:
            keep = kept[group.path, group.kind]
        cuts.append((group, keep))
    with masked(twin, cuts):
        assert relative_error(sliced, probe_outputs(twin, inputs)) < 1e-5
    assert relative_error(sliced, probe_outputs(model, inputs)) > 1e-3
    assert shapes_of(pruned) == predicted
    assert footprint(pruned).parameters < footprint(model).parameters
    pruned.save_pretrained(folder)
    reloaded = type(model).from_pretrained(folder)
    assert torch.equal(probe_outputs(reloaded, inputs), sliced)
    return reloaded


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forward_channels(family, tmp_path):
    reloaded = _check(tiny_model(family), lc.StructuredPruning(ffn=0.4, round_to=1), tmp_path)
    assert "quantization_config" not in reloaded.config.to_dict()


@pytest.mark.parametrize("family", HEADS_IN_CONFIG)
def test_heads_that_a_config_tells(family, tmp_path):
    reloaded = _check(tiny_model(family), lc.StructuredPruning(heads=0.5), tmp_path)
    assert "quantization_config" not in reloaded.config.to_dict()


@pytest.mark.parametrize("family", GROUPED)
def test_query_heads(family, tmp_path):
    model = tiny_model(family)
    reloaded = _check(model, lc.StructuredPruning(query_heads=0.5), tmp_path)
    assert reloaded.config.num_key_value_heads == model.config.num_key_value_heads
    assert reloaded.config.num_attention_heads == 2


def test_experts_and_all_together(tmp_path):
    model = tiny_model("mixtral")
    reloaded = _check(model, lc.StructuredPruning(experts=0.5), tmp_path / "experts")
    assert reloaded.config.num_local_experts == 2
    _check(model, lc.StructuredPruning(experts=0.25, heads=0.5, ffn=0.5), tmp_path / "all")


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "opt", "gpt_neox"])
def test_heads_that_no_config_tells(family):
    model = tiny_model(family)
    with pytest.raises(lc.UnsupportedModelError, match=r"number of heads .* uniform=False"):
        _compress(model, lc.StructuredPruning(heads=0.5))
    step = lc.StructuredPruning(heads=0.5, uniform=False)
    result = _compress(model, step)
    assert shapes_of(result.model) == step.predicted_shapes(model)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi3"])
def test_fused_projections_lose_the_right_heads(family):
    """Silencing one head by hand, in q, k, v and o found by the layout, is what the group silences."""
    model = tiny_model(family)
    body = anatomy(model)
    attention = body.blocks()[0].attentions[0]
    group = head_groups(model, body)[0]
    member = next(member for member in group.members if "weight" in member.tensor and not member.consumes)
    rows = (member.channel == 1).nonzero().flatten()
    width, heads, kv = attention.head_dim, attention.heads, attention.kv_heads
    expected = {
        "gpt2": [*range(16, 32), *range(80, 96), *range(144, 160)],
        "gpt_neox": list(range(48, 96)),
        "phi3": [*range(32, 64), *range(64 + 16, 64 + 32), *range(96 + 16, 96 + 32)],
    }
    assert rows.tolist() == expected[family]
    assert len(member.channel) == (heads + 2 * kv) * width


def test_the_weakest_channels_go():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[::2] *= 1e-3
        model.model.layers[0].mlp.gate_proj.weight[::2] *= 1e-3
        model.model.layers[0].mlp.down_proj.weight[:, ::2] *= 1e-3
    context = lc.Context()
    lc.StructuredPruning(ffn=0.5).compress(model, context)
    assert context.history[0].kept == tuple(range(1, 128, 2))


def test_the_weakest_head_goes_and_its_neighbours_stay():
    model = tiny_model("bert")
    attention = model.bert.encoder.layer[1].attention
    with torch.no_grad():
        for part in (attention.self.query, attention.self.key, attention.self.value):
            part.weight[16:32] *= 1e-3
        attention.output.dense.weight[:, 16:32] *= 1e-3
    query = attention.self.query.weight.clone()
    context = lc.Context()
    lc.StructuredPruning(heads=0.25, uniform=False).compress(model, context)
    assert context.history[1].kept == (0, 2, 3)
    assert torch.equal(model.bert.encoder.layer[1].attention.self.query.weight, torch.cat([query[:16], query[32:]]))


def test_channel_magnitude_by_hand():
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[0]
    with torch.no_grad():
        for weight in (layer.intermediate.dense.weight, layer.output.dense.weight):
            weight.fill_(1.0)
        layer.intermediate.dense.weight[3] = 0
    [scores] = score_groups(model, feed_forward_groups(anatomy(model))[:1], "magnitude", Evidence(), lc.Context())
    up = 64 * torch.ones(128) / (127 / 128)
    up[3] = 0
    assert torch.allclose(scores, (up + 64).sqrt())


def test_t5_shares_one_bias_and_so_one_choice_of_heads():
    model = tiny_model("t5")
    groups = head_groups(model, anatomy(model))
    assert groups[0].path == "encoder.block"
    table = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert table in {member.tensor for member in groups[0].members}
    assert new_shapes(model, [(groups[0], 3)])[table] == (32, 3)


def test_query_heads_keep_equal_numbers():
    group = query_head_groups(tiny_model("llama"), anatomy(tiny_model("llama")))[0]
    keep = dearest(group, torch.tensor([5.0, 4.0, 1.0, 2.0]), 2)
    assert keep.tolist() == [0, 3]


def test_rounds_score_what_is_left():
    """A channel that only shone beside another one goes in the second round."""
    model = tiny_model("bert")
    once, thrice = lc.Context(), lc.Context()
    lc.StructuredPruning(ffn=0.5).compress(copy.deepcopy(model), once)
    lc.StructuredPruning(ffn=0.5, rounds=3).compress(copy.deepcopy(model), thrice)
    assert [len(entry.kept) for entry in thrice.history] == [len(entry.kept) for entry in once.history]


def test_global_scope_spends_where_it_matters():
    model = tiny_model("llama")
    with torch.no_grad():  # in layer 0 few channels matter; in layer 1 all alike
        for part in (model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj):
            part.weight[32:] *= 0.01
        model.model.layers[0].mlp.down_proj.weight[:, 32:] *= 0.01
    result = _compress(model, lc.StructuredPruning(ffn=0.5, scope="global", uniform=False))
    first, second = (layer.mlp.up_proj.out_features for layer in result.model.model.layers)
    assert first < 64 < second
    assert abs(first + second - 128) <= 8


def test_global_floor():
    groups = feed_forward_groups(anatomy(tiny_model("bert")))
    flat, spread = torch.ones(128), torch.cat([torch.full((1,), 1e6), torch.ones(127)])
    counts = shared_out(groups, [flat, spread], share=0.5, floor=0.25, multiple=8)
    assert counts == [96, 32]


def test_silence_and_cut_agree_on_shared_widths():
    """A group with positions that always stay: they are neither zeroed nor lost."""
    model = tiny_model("phi3")
    group = query_head_groups(model, anatomy(model))[0]
    before = model.model.layers[0].self_attn.qkv_proj.weight.clone()
    keep = torch.tensor([1, 2])
    silence(model, group, keep)
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight[64:], before[64:])
    assert (model.model.layers[0].self_attn.qkv_proj.weight[:16] == 0).all()
    cut(model, group, keep)
    expected = torch.cat([before[16:48], before[64:]])
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight, expected)


def test_the_nearest_legal_number_of_heads_is_taken_and_told():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 64}
    # 96 is no multiple of 5 or 7 heads: LlamaConfig refuses them.
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, num_key_value_heads=8))
    result = _compress(model, lc.StructuredPruning(heads=0.35))
    assert result.model.config.num_attention_heads == 6
    assert any("nearest size that is legal" in (action.reason or "") for action in result.report.steps[0].touched)


def test_round_to_and_its_refusals():
    assert (
        _compress(tiny_model("bert"), lc.StructuredPruning(ffn=0.3, round_to=32)).model.config.intermediate_size == 96
    )
    with pytest.raises(lc.NothingToCompressError, match="lower round_to or raise ffn"):
        _compress(tiny_model("bert"), lc.StructuredPruning(ffn=0.1, round_to=64))


def test_refusals():
    with pytest.raises(lc.NothingToCompressError, match="use query_heads"):
        _compress(tiny_model("gemma"), lc.StructuredPruning(heads=0.5))
    with pytest.raises(lc.UnsupportedModelError, match="its own key and value head; use heads"):
        _compress(tiny_model("bert"), lc.StructuredPruning(query_heads=0.5))
    with pytest.raises(lc.UnsupportedModelError, match="no mixture of experts"):
        _compress(tiny_model("bert"), lc.StructuredPruning(experts=0.5))
    with pytest.raises(lc.ConfigError, match=r"experts must leave at least the 2 .* got 0\.75: 1 of 4"):
        _compress(tiny_model("mixtral"), lc.StructuredPruning(experts=0.75))
    with pytest.raises(lc.ConfigError, match="pass uniform=False"):
        lc.StructuredPruning(ffn=0.5, scope="global")
    with pytest.raises(lc.ConfigError, match="not both"):
        lc.StructuredPruning(heads=0.5, query_heads=0.5)
    with pytest.raises(lc.ConfigError, match=r"ffn must be in \(0, 1\), got 1\.5"):
        lc.StructuredPruning(ffn=1.5)


def test_heads_of_bloom_are_refused_and_the_model_untouched():
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=64, n_layer=1, n_head=4))
    before = copy.deepcopy(model.state_dict())
    for step in (lc.StructuredPruning(heads=0.5), lc.StructuredPruning(heads=0.5, uniform=False)):
        with pytest.raises(lc.UnsupportedModelError, match=r"BloomForCausalLM.*(config|depends on their number)"):
            _compress(model, step)
    with pytest.raises(lc.UnsupportedModelError, match="FFN width of BloomForCausalLM"):
        _compress(model, lc.StructuredPruning(ffn=0.5))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_encoder_and_decoder_widths_of_their_own():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=64, decoder_ffn_dim=128,
        encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    pruned = _compress(BartForConditionalGeneration(config), lc.StructuredPruning(ffn=0.5)).model
    assert (pruned.config.encoder_ffn_dim, pruned.config.decoder_ffn_dim) == (32, 64)
