"""Hidden features: the residual stream loses them everywhere at once, and the rest computes what it did."""

import copy

import pytest
import torch
from torch import nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

import llmcompress as lc
from llmcompress.anatomy import anatomy
from llmcompress.anatomy.groups import silence
from llmcompress.anatomy.probe import probe_outputs, relative_error
from llmcompress.anatomy.residual import norm_kind, rescale, residual_group
from llmcompress.anatomy.sizes import shapes_of
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

# Families whose config tells the hidden size apart from the size of the heads; all of them have RMSNorms.
TOLD = {"llama", "qwen2", "qwen3", "gemma", "phi3", "mixtral", "t5"}


def _pruned(model, **settings):
    result = lc.compress(model, lc.StructuredPruning(hidden=0.25, **settings), progress=False)
    context = lc.Context()
    lc.StructuredPruning(hidden=0.25, **settings).compress(copy.deepcopy(model), context)
    [cut] = context.history
    assert (cut.path, cut.axis, cut.of) == ("", "hidden", 64)
    return result, torch.tensor(cut.kept)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("uniform", [True, False])
def test_features_go_and_the_folder_loads(family, uniform, tmp_path):
    model = tiny_model(family)
    step = lc.StructuredPruning(hidden=0.25, uniform=uniform)
    if uniform and family not in TOLD:
        with pytest.raises(lc.UnsupportedModelError, match=r"hidden size .* uniform=False"):
            lc.compress(model, step, progress=False)
        return
    predicted = step.predicted_shapes(model)
    result, kept = _pruned(model, uniform=uniform)
    assert shapes_of(result.model) == predicted
    assert len(kept) == 48
    inputs = tiny_inputs(model)
    sliced = probe_outputs(result.model, inputs)
    silenced = copy.deepcopy(model)
    silence(silenced, residual_group(silenced, anatomy(silenced)), kept)
    # Nothing but zeros: an RMSNorm differs by its epsilon; a LayerNorm takes another mean, and the report says so.
    told = [action.reason for action in result.report.steps[0].left if "mean over fewer features" in action.reason]
    difference = relative_error(sliced, probe_outputs(silenced, inputs))
    assert difference < (1e-3 if family in TOLD else 0.5)
    assert bool(told) == (difference > 1e-4)
    assert relative_error(sliced, probe_outputs(model, inputs)) > 1e-2
    result.model.save_pretrained(tmp_path)
    reloaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(probe_outputs(reloaded, inputs), sliced)
    assert ("quantization_config" in reloaded.config.to_dict()) != uniform
    if model.can_generate():
        ask = {"input_ids": inputs["input_ids"][:1], "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
        assert torch.equal(reloaded.generate(**ask, use_cache=True), reloaded.generate(**ask, use_cache=False))


def test_constants_of_the_hidden_size_are_taken_back():
    """Gemma scales its embeddings by the root of the hidden size, T5 its last states by the inverse."""
    gemma = _pruned(tiny_model("gemma"))[0].model
    assert float(gemma.model.embed_tokens.embed_scale) == pytest.approx(48**0.5)
    t5 = _pruned(tiny_model("t5"))[0].model
    assert t5.model_dim == 48


def test_a_size_that_a_config_refuses_is_not_taken():
    """LlamaConfig wants a multiple of the number of heads: 40 of 64 is none with 3 heads, and 42 is the nearest."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 60, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=3)).eval()
    step = lc.StructuredPruning(hidden=1 / 3, round_to=1)
    assert lc.compress(model, step, progress=False).model.config.hidden_size == 39
    with pytest.raises(lc.UnsupportedModelError, match="hidden size"):
        lc.compress(model, lc.StructuredPruning(hidden=0.99, round_to=59), progress=False)


def test_latent_attention_is_refused():
    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32}
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "first_k_dense_replace": 2}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, **latent, **counts, n_routed_experts=8, n_group=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lc.UnsupportedModelError, match=r"hidden of DeepseekV3ForCausalLM cannot be pruned.*use ffn"):
        lc.compress(model, lc.StructuredPruning(hidden=0.25), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_distillation_after_it_needs_nothing_told(family):
    model = tiny_model(family)
    distil = lc.KnowledgeDistillation(steps=2, features={"hidden": 1.0}, max_length=16, batch_size=4, precision="fp32")
    steps = [lc.StructuredPruning(hidden=0.25, ffn=0.5, uniform=False), distil, lc.DynamicQuantization()]
    result = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert torch.isfinite(probe_outputs(result.model, tiny_inputs(model))).all()


class _PlusOne(nn.RMSNorm):
    def forward(self, features):
        return nn.functional.rms_norm(features, self.normalized_shape, self.weight + 1, self.eps)


@pytest.mark.parametrize(
    ("norm", "kind"),
    [
        (nn.LayerNorm(8), "layer"),
        (nn.LayerNorm(8, bias=False), "layer"),
        (nn.RMSNorm(8, eps=1e-6), "rms"),
        (_PlusOne(8, eps=1e-6), "rms, weight + 1"),
        (nn.Linear(8, 8), "other"),
        (nn.PReLU(8), "other"),
    ],
)
def test_norms_are_told_apart_by_what_they_do(norm, kind):
    assert norm_kind(norm) == kind


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8), _PlusOne(8)])
def test_rescaled_norms_put_out_a_multiple(norm):
    nn.init.normal_(norm.weight)
    features = torch.randn(3, 8)
    before = norm(features)
    rescale(norm, 1.5)
    torch.testing.assert_close(norm(features), 1.5 * before)
