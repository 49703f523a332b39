"""Scales that move between layers: the sites of every family are found, and folding leaves the logits alone."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModel, FalconConfig, FalconForCausalLM, GPTNeoXConfig, GPTNeoXForCausalLM

import llmcompress as lc
from llmcompress.anatomy.probe import probe_inputs, probe_outputs, relative_error
from llmcompress.anatomy.scaling import fold, scale_sites
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model

_QKV = ("q_proj", "k_proj", "v_proj")
_GATED = {
    "input_layernorm": _QKV,
    "v_proj": ("o_proj",),
    "post_attention_layernorm": ("gate_proj", "up_proj"),
    "up_proj": ("down_proj",),
}
# Of a block, by the last name of each path: what is divided, and what reads it.
EXPECTED = {
    "bert": {"value": ("dense",)},
    "distilbert": {"v_lin": ("out_lin",)},
    "roberta": {"value": ("dense",)},
    "gpt2": {"ln_1": ("c_attn",), "c_attn": ("c_proj",), "ln_2": ("c_fc",)},
    "opt": {"self_attn_layer_norm": _QKV, "v_proj": ("out_proj",), "final_layer_norm": ("fc1",), "fc1": ("fc2",)},
    "gpt_neox": {
        "input_layernorm": ("query_key_value",),
        "query_key_value": ("dense",),
        "post_attention_layernorm": ("dense_h_to_4h",),
    },
    "llama": _GATED,
    "qwen2": _GATED,
    "qwen3": _GATED,
    "gemma": _GATED,
    "phi3": {
        "input_layernorm": ("qkv_proj",),
        "qkv_proj": ("o_proj",),
        "post_attention_layernorm": ("gate_up_proj",),
        "gate_up_proj": ("down_proj",),
    },
    "mixtral": {
        "input_layernorm": _QKV,
        "v_proj": ("o_proj",),
        "post_attention_layernorm": ("gate", "gate_up_proj"),
    },
}
# Each norm of T5 is called layer_norm, so these are told by the place in the block.
_T5_ENCODER = {
    "layer.0.layer_norm": ("q", "k", "v"),
    "layer.0.SelfAttention.v": ("o",),
    "layer.1.layer_norm": ("wi",),
    "layer.1.DenseReluDense.wi": ("wo",),
}
_T5_DECODER = {
    "layer.0.layer_norm": ("q", "k", "v"),
    "layer.0.SelfAttention.v": ("o",),
    "layer.1.layer_norm": ("q",),  # keys and values read the encoder's last norm
    "layer.1.EncDecAttention.v": ("o",),
    "layer.2.layer_norm": ("wi",),
    "layer.2.DenseReluDense.wi": ("wo",),
}


def last(path):
    return path.rsplit(".", 1)[-1]


def in_double(model):
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no float64
    return model.double()


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


def fold_all(model, sites):
    generator = torch.Generator().manual_seed(1)
    for site in sites:
        fold(model, site, (torch.rand(site.channels, generator=generator, dtype=torch.float64) + 0.1) * 4)


def vary(model):
    """Draw norms and biases, which a fresh model has all alike."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_leaves_the_logits_of_every_family_alone(family):
    model = vary(tiny_model(family))
    sites = scale_sites(model)
    model = in_double(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = logits(model)
    fold_all(model, sites)
    # Gemma's norms cast their weight to float32.
    assert relative_error(logits(model), expected) < (1e-5 if family == "gemma" else 1e-12)
    after = model.state_dict()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert {site.source for site in sites} | {name for site in sites for name in site.consumers} <= changed


@pytest.mark.parametrize("family", EXPECTED)
def test_the_sites_of_every_family_are_found(family):
    model = tiny_model(family)
    before = copy.deepcopy(model.state_dict())
    sites = scale_sites(model)
    for block in ("0", "1"):
        found = {last(s.source): tuple(map(last, s.consumers)) for s in sites if f".{block}." in s.source}
        assert {source: set(names) for source, names in found.items()} == {
            source: set(names) for source, names in EXPECTED[family].items()
        }
    assert len(sites) == 2 * len(EXPECTED[family])
    assert all(site.offset == (1.0 if family == "gemma" and site.kind == "norm" else 0.0) for site in sites)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_sites_of_an_encoder_decoder_are_found():
    sites = {site.source: tuple(map(last, site.consumers)) for site in scale_sites(tiny_model("t5"))}
    expected = {
        f"{stack}.block.{block}.{source}": names
        for stack, own in (("encoder", _T5_ENCODER), ("decoder", _T5_DECODER))
        for block in (0, 1)
        for source, names in own.items()
    }
    assert sites == expected


def test_query_heads_of_a_group_read_one_channel_of_the_values():
    site = next(s for s in scale_sites(tiny_model("llama")) if s.source.endswith("0.self_attn.v_proj"))
    assert site.channels == 32
    assert site.columns.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_of_a_fused_projection_the_values_and_the_up_half_are_divided():
    sites = {last(site.source): site for site in scale_sites(tiny_model("phi3"))}
    assert sites["qkv_proj"].source_rows.tolist() == [*range(96, 128)]
    assert sites["gate_up_proj"].source_rows.tolist() == [*range(128, 256)]
    heads = next(site for site in scale_sites(tiny_model("gpt_neox")) if "query_key_value" in site.source)
    assert heads.source_rows.tolist() == [row for head in range(4) for row in range(48 * head + 32, 48 * head + 48)]


@pytest.mark.parametrize(
    ("task", "architecture", "kinds"),
    [
        ("causal-lm", "bloom", {"norm", "linear"}),
        ("causal-lm", "gemma2", {"norm", "linear"}),
        ("causal-lm", "deepseek_v3", {"norm", "linear"}),
        ("causal-lm", "olmo2", {"linear"}),  # its norms come behind
        ("causal-lm", "mamba2", {"norm"}),
        ("seq2seq-lm", "pegasus", {"norm", "linear"}),
        ("classification", "modernbert", {"norm", "linear"}),
    ],
)
def test_sites_of_other_architectures_hold(task, architecture, kinds):
    model = build_tiny(task, architecture)
    sites = scale_sites(model)
    assert {site.kind for site in sites} == kinds
    inputs = probe_inputs(model)
    expected = probe_outputs(model, inputs)
    fold_all(model, sites)
    assert relative_error(probe_outputs(model, inputs), expected) < 1e-4


def test_one_norm_before_attention_and_network_is_one_site():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = FalconConfig(**sizes, parallel_attn=True, new_decoder_architecture=False, multi_query=True, bias=False)
    model = FalconForCausalLM(config).eval()
    site = next(site for site in scale_sites(model) if site.kind == "norm")
    assert set(map(last, site.consumers)) == {"query_key_value", "dense_h_to_4h"}
    expected = logits(model.double())
    fold_all(model, scale_sites(model))
    assert relative_error(logits(model), expected) < 1e-12


def test_serial_neox_and_other_activations():
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GPTNeoXConfig(**sizes, intermediate_size=64, use_parallel_residual=False, hidden_act="relu")
    sites = {last(site.source) for site in scale_sites(GPTNeoXForCausalLM(config).eval())}
    assert sites == {"input_layernorm", "query_key_value", "post_attention_layernorm", "dense_h_to_4h"}


def test_what_else_reads_a_norm_takes_its_site_away():
    model = tiny_model("llama")
    block = model.model.layers[1]
    own = block.mlp.forward
    # A path past the network: nothing of it shows in the modules.
    block.mlp.forward = lambda x: own(x) + 0.1 * x
    sources = {site.source for site in scale_sites(model)}
    assert "model.layers.1.post_attention_layernorm" not in sources
    assert "model.layers.0.post_attention_layernorm" in sources


def test_tied_weights_and_modules_that_never_run_are_no_sites():
    model = tiny_model("llama")
    first, second = model.model.layers
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    sources = {site.source for site in scale_sites(model)}
    assert not any("input_layernorm" in source for source in sources)
    model = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    # Read without being called, as some models do with theirs.
    attention.o_proj.forward = None
    weight = attention.o_proj.weight
    attention.o_proj.__class__ = type(
        "Read", (nn.Linear,), {"__call__": lambda self, x: nn.functional.linear(x, weight)}
    )
    assert "model.layers.0.self_attn.v_proj" not in {site.source for site in scale_sites(model)}


def test_half_precision_finds_the_same(tmp_path):
    sites = scale_sites(tiny_model("gemma"))
    assert [str(site) for site in scale_sites(tiny_model("gemma").bfloat16())] == [str(site) for site in sites]
    tiny_model("llama").save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert len(scale_sites(base)) == 8


@pytest.mark.parametrize("scales", [torch.ones(3), -torch.ones(64), torch.full((64,), torch.inf), torch.zeros(64)])
def test_bad_scales_are_refused(scales):
    model = tiny_model("opt")
    site = scale_sites(model)[0]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lc.ConfigError, match="scales of model"):
        fold(model, site, scales)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
