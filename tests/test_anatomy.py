import pytest
import torch
from torch import nn

import llmcompress as lc
from llmcompress.anatomy import anatomy
from llmcompress.anatomy.footprint import footprint
from llmcompress.anatomy.layers import select, weight_layers
from llmcompress.anatomy.probe import probe_inputs, probe_outputs
from llmcompress.anatomy.surgery import keep_features, keep_inputs, keep_outputs, keep_rows, replace, retie, ties
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model

# What each family is by its definition in transformers: heads, key-value heads, head width, FFN width, gated, fused
# qkv, number of stacks.
TRUTH = {
    "bert": (4, 4, 16, 128, False, None, 1),
    "distilbert": (4, 4, 16, 128, False, None, 1),
    "roberta": (4, 4, 16, 128, False, None, 1),
    "gpt2": (4, 4, 16, 256, False, "[q|k|v]", 1),
    "opt": (4, 4, 16, 128, False, None, 1),
    "gpt_neox": (4, 4, 16, 128, False, "per head [q|k|v]", 1),
    "llama": (4, 2, 16, 128, True, None, 1),
    "qwen2": (4, 2, 16, 128, True, None, 1),
    "qwen3": (4, 2, 32, 128, True, None, 1),
    "gemma": (4, 1, 16, 128, True, None, 1),
    "phi3": (4, 2, 16, 128, True, "[q|k|v]", 1),
    "mixtral": (4, 2, 16, 128, True, None, 1),
    "t5": (4, 4, 16, 128, False, None, 2),
}
TIED = {"gpt2", "opt", "llama", "gemma", "t5"}


@pytest.mark.parametrize("family", FAMILIES)
def test_is_right_on_every_family(family):
    model = tiny_model(family)
    body = anatomy(model)
    heads, kv_heads, head_dim, width, gated, fused, stacks = TRUTH[family]
    assert len(body.stacks) == stacks
    assert all(len(stack) == 2 for stack in body.stacks)
    for block in body.blocks():
        assert not block.others
        assert len(block.attentions) == (2 if block.path.startswith("decoder") else 1)
        for attention in block.attentions:
            assert (attention.heads, attention.kv_heads, attention.head_dim) == (heads, kv_heads, head_dim)
            assert (attention.layout if attention.qkv else None) == fused
        networks = [*block.feed_forwards, *(experts.inner for experts in block.experts)]
        assert [network.width for network in networks] == [width]
        assert bool(networks[0].gate or networks[0].gate_up) == gated
    assert bool(body.ties) == (family in TIED)
    assert (body.head is not None) == model.can_generate()
    assert body.hidden == 64
    # Every block matrix is accounted for: nothing is left over.
    parts = [p.path for b in body.blocks() for a in b.attentions for p in a.projections()]
    parts += [p.path for network in body.feed_forwards() for p in network.projections()]
    blocks = [
        layer.name
        for layer in weight_layers(model)
        if layer.place == "block" and layer.kind not in ("embedding", "other")
    ]
    assert sorted(parts) == sorted(blocks)
    assert str(body).startswith(type(model).__name__)


def test_special_parts():
    mixtral = anatomy(tiny_model("mixtral")).blocks()[0].experts[0]
    assert (mixtral.count, mixtral.top_k, mixtral.router) == (4, 2, "model.layers.0.mlp.gate.weight")
    assert mixtral.inner.layout == "[gate|up]"
    assert anatomy(tiny_model("phi3")).feed_forwards()[0].layout == "[gate|up]"
    assert anatomy(tiny_model("qwen3")).blocks()[0].attentions[0].norms[0].endswith("q_norm")
    t5 = anatomy(tiny_model("t5"))
    assert [attention.cross for attention in t5.stacks[1][0].attentions] == [False, True]


def test_layouts_of_models_it_was_not_written_for():
    from transformers import (
        BloomConfig,
        BloomForCausalLM,
        FalconConfig,
        FalconForCausalLM,
        GptOssConfig,
        GptOssForCausalLM,
    )

    bloom = BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=64, n_layer=1, n_head=4))
    assert anatomy(bloom).blocks()[0].attentions[0].layout == "per head [q|k|v]"
    sizes = {"vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    falcon = FalconForCausalLM(FalconConfig(**sizes, new_decoder_architecture=True, num_kv_heads=2))
    assert anatomy(falcon).blocks()[0].attentions[0].layout == "per group [q..|k|v]"
    oss = GptOssConfig(**sizes, num_key_value_heads=2, head_dim=16, intermediate_size=64, num_local_experts=4)
    assert anatomy(GptOssForCausalLM(oss)).blocks()[0].experts[0].inner.layout == "gate, up interleaved"


def test_needs_no_weights_but_for_fused_layouts():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2))
    assert anatomy(model).blocks()[1].feed_forwards[0].width == 11008
    with torch.device("meta"):
        fused = FAMILIES["phi3"]()
    assert anatomy(fused).blocks()[0].attentions[0].layout == "unknown"


def test_refuses_honestly_what_it_does_not_know():
    from transformers import ResNetConfig, ResNetForImageClassification, Wav2Vec2Config, Wav2Vec2Model

    model = ResNetForImageClassification(ResNetConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]))
    with pytest.raises(lc.UnsupportedModelError, match=r"looked for a ModuleList.*found resnet\.encoder\.stages"):
        anatomy(model)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    sound = Wav2Vec2Model(Wav2Vec2Config(**sizes, conv_dim=[8], conv_stride=[2], conv_kernel=[3]))
    with pytest.raises(lc.UnsupportedModelError, match="reads input_values; only models of text or images"):
        tiny_inputs(sound)


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: __import__("transformers").Conv1D(4, 6)])
def test_cutting_a_linear_gives_the_same_numbers(make):
    layer = make()
    nn.init.normal_(layer.weight)
    x, keep = torch.randn(3, 6), torch.tensor([0, 2, 3])
    expected = layer(x)[:, keep]
    keep_outputs(layer, keep)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    inputs = torch.tensor([1, 4])
    expected = layer(torch.zeros(3, 6).index_copy(1, inputs, x[:, inputs]))
    keep_inputs(layer, inputs)
    assert torch.allclose(layer(x[:, inputs]), expected, atol=1e-6)
    assert layer.weight.requires_grad


def test_cutting_embeddings_and_norms():
    table = nn.Embedding(6, 4, padding_idx=2)
    rows = table.weight.detach().clone()
    keep_rows(table, torch.tensor([5, 2]))
    assert torch.equal(table(torch.tensor([0])), rows[[5]])
    assert table.padding_idx == 1
    keep_features(table, torch.tensor([3, 1]))
    assert torch.equal(table(torch.tensor([0])), rows[5, [3, 1]][None])
    norm = nn.LayerNorm(4)
    keep_features(norm, torch.tensor([0, 3]))
    assert norm(torch.randn(2, 2)).shape == (2, 2)


@pytest.mark.parametrize("family", sorted(TIED))
def test_ties_come_back(family):
    model = tiny_model(family)
    before, out = ties(model), probe_outputs(model, tiny_inputs(model))
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    assert ties(model) != before
    retie(model, before)
    assert ties(model) == before
    assert torch.equal(probe_outputs(model, tiny_inputs(model)), out)


def test_replace():
    model = tiny_model("bert")
    replace(model, "bert.encoder.layer.1.output.dense", nn.Identity())
    assert isinstance(model.bert.encoder.layer[1].output.dense, nn.Identity)


@pytest.mark.parametrize("family", FAMILIES)
def test_footprint_is_what_is_written(family, tmp_path):
    model = tiny_model(family)
    size = footprint(model)
    model.save_pretrained(tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    assert abs(written - size.disk_bytes) <= (4096 if family == "mixtral" else 64)
    assert size.parameters == model.num_parameters()
    zeros = sum(int((p == 0).sum()) for p in model.parameters())
    assert size.nonzero == size.parameters - zeros


def test_select_says_why_it_leaves_a_layer():
    model = tiny_model("llama")
    chosen, left = select(model, who="Test", targets=None, skip=("*.down_proj",))
    assert all("down_proj" not in layer.name for layer in chosen)
    assert len(chosen) + len(left) == len(weight_layers(model))
    reasons = {action.path: action.reason for action in left}
    assert reasons["lm_head"] == "tied to model.embed_tokens"
    assert reasons["model.layers.0.mlp.down_proj"] == "skip='*.down_proj'"
    for field in ({"targets": ("nope",)}, {"targets": None, "skip": ("nope",)}):
        with pytest.raises(lc.NothingToCompressError, match="nope"):
            select(model, who="Test", **field)


def test_probe_inputs_take_a_list_of_end_tokens():
    model = tiny_model("llama")
    model.config.eos_token_id = [3, 5]
    assert not {2, 3, 5} & set(probe_inputs(model, rows=4, tokens=64)["input_ids"].flatten().tolist())
