"""Sizes that no plain config tells: models cut by hand, layer by layer, and what their folders give back."""

import copy
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertModel,
    LlamaForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5EncoderModel,
    Trainer,
    TrainingArguments,
)

import llmcompress as lc
from llmcompress.anatomy import anatomy
from llmcompress.anatomy.depth import keep_blocks
from llmcompress.anatomy.module_sizes import module_sizes, quantized_by, resize
from llmcompress.anatomy.sizes import matches_config
from llmcompress.anatomy.surgery import keep_channels, keep_features, keep_inputs, keep_outputs, keep_rows
from llmcompress.quantization.hf import mark
from llmcompress.testing import FAMILIES, save_expected, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer


def without(count, *gone, width=16):
    """Return the features of `count` heads of `width` but those of the heads `gone`."""
    return torch.tensor([head * width + i for head in range(count) if head not in gone for i in range(width)])


def cut_bert(model):
    attention, keep = model.bert.encoder.layer[0].attention, without(4, 1)
    for layer in (attention.self.query, attention.self.key, attention.self.value):
        keep_outputs(layer, keep)
    keep_inputs(attention.output.dense, keep)
    attention.self.num_attention_heads, attention.self.all_head_size = 3, 48


def cut_gpt2(model):
    attention, keep = model.transformer.h[0].attn, without(4, 3)
    keep_outputs(attention.c_attn, torch.cat([keep, keep + 64, keep + 128]))
    keep_inputs(attention.c_proj, keep)
    attention.num_heads, attention.split_size = 3, 48


def cut_llama(model):
    for network, width in zip(anatomy(model).feed_forwards(), (96, 40), strict=True):
        keep_channels(network, torch.randperm(128)[:width].sort().values)
    attention = model.model.layers[1].self_attn
    keep_outputs(attention.q_proj, without(4, 0, 1))
    keep_outputs(attention.k_proj, without(2, 0))
    keep_outputs(attention.v_proj, without(2, 0))
    keep_inputs(attention.o_proj, without(4, 0, 1))


def cut_mixtral(model):
    for network, width in zip(anatomy(model).feed_forwards(), (64, 96), strict=True):
        keep_channels(network, torch.arange(width).expand(4, -1))
        model.get_submodule(network.path).intermediate_dim = width
    mixture = model.model.layers[1].mlp
    for owner, name in ((mixture.experts, "gate_up_proj"), (mixture.experts, "down_proj"), (mixture.gate, "weight")):
        setattr(owner, name, nn.Parameter(getattr(owner, name).detach()[1:].contiguous()))
        owner.num_experts = 3


def cut_t5(model):
    keep = without(4, 2)
    for block in model.encoder.block:
        attention = block.layer[0].SelfAttention
        for layer in (attention.q, attention.k, attention.v):
            keep_outputs(layer, keep)
        keep_inputs(attention.o, keep)
        attention.n_heads, attention.inner_dim = 3, 48
    keep_features(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias, torch.tensor([0, 1, 3]))
    keep_channels(anatomy(model).feed_forwards()[3], torch.arange(56))


def cut_resnet(model):
    first, second = model.resnet.encoder.stages[0].layers[0].layer
    keep = torch.tensor([0, 2, 3, 5, 7])
    convolution, norm = first.convolution, first.normalization
    convolution.weight = nn.Parameter(convolution.weight.detach()[keep])
    convolution.out_channels = norm.num_features = second.convolution.in_channels = len(keep)
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = getattr(norm, name).detach()[keep]
        setattr(norm, name, nn.Parameter(value) if name in norm._parameters else value)
    second.convolution.weight = nn.Parameter(second.convolution.weight.detach()[:, keep])


CUTS = {"bert": cut_bert, "gpt2": cut_gpt2, "llama": cut_llama, "mixtral": cut_mixtral, "t5": cut_t5}


class HandCut(lc.Compressor):
    """A step that cuts by the functions above."""

    def plan(self, model, context):
        return [lc.Action(path="", does="cut")]

    def compress(self, model, context):
        CUTS[model.config.model_type](model)
        return model

    def to_dict(self):
        return {"name": "hand_cut"}


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config)
    with torch.no_grad():
        model(torch.randn(4, 3, 32, 32))  # in train mode: the running statistics become other than 0 and 1
    return model.eval()


def cut(family):
    model = tiny_model(family)
    CUTS[family](model)
    mark(model)
    return model


def half(model, folder):
    # By way of a folder: a cast in memory would round the rotary frequencies as well, which no folder holds.
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)


def logits(model, inputs=None):
    with torch.inference_mode():
        return model.eval()(**(tiny_inputs(model) if inputs is None else inputs)).logits


def as_json(model):
    return json.loads(json.dumps(model.config.quantization_config.to_dict()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_model_has_nothing_to_tell(family):
    assert module_sizes(tiny_model(family)) == {}
    mark(model := tiny_model(family))
    assert "quantization_config" not in model.config.to_dict()


def test_what_differs_is_told_and_nothing_else():
    model = tiny_model("bert")
    cut_bert(model)
    attention = "bert.encoder.layer.0.attention"
    rows = {"tensors": {"weight": [48, 64], "bias": [48]}, "attributes": {"out_features": 48}}
    assert module_sizes(model) == {
        f"{attention}.self": {"tensors": {}, "attributes": {"num_attention_heads": 3, "all_head_size": 48}},
        **{f"{attention}.self.{name}": rows for name in ("query", "key", "value")},
        f"{attention}.output.dense": {"tensors": {"weight": [64, 48]}, "attributes": {"in_features": 48}},
    }


def test_a_running_count_of_a_module_is_no_size():
    model = tiny_model("bert")
    model.bert.encoder.layer[1].calls = 7
    assert model.bert.encoder.layer[1].seq_len_dim == 1  # one that the built model has as well
    model.bert.encoder.layer[1].seq_len_dim = 10**9
    assert module_sizes(model) == {}
    cut_bert(model)
    model.bert.encoder.layer[0].seq_len_dim = 10**9
    assert not any("layer.1" in path or path.endswith("layer.0") for path in module_sizes(model))


def test_every_folder_loads_in_a_fresh_process_cut_and_then_quantized(reloads, tmp_path):
    models = {family: cut(family) for family in CUTS}
    cut_resnet(convolutions := resnet())
    mark(convolutions)
    models["resnet"] = convolutions
    for family in CUTS:
        models[f"{family}-int8"] = lc.compress(models[family], "dynamic_quantization", progress=False).model
    models["half"] = half(models["llama"], tmp_path / "float")
    for name, model in models.items():
        assert not matches_config(model)
        image = {"pixel_values": torch.randn(2, 3, 32, 32)}
        inputs = image if name == "resnet" else tiny_inputs(model)
        expected = logits(model, inputs)
        model.save_pretrained(tmp_path / name)
        save_expected(model, tmp_path / name, inputs)
        again = lc.load(tmp_path / name)
        assert torch.equal(logits(again, inputs), expected)
        assert as_json(again) == as_json(model)
        assert type(again.config.quantization_config.sizes) is dict
        assert again.dtype == model.dtype
        assert (quantized_by(again) == "llmcompress") == name.endswith("int8")
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    reloads.extend(tmp_path / name for name in models)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral", "t5"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_with_a_cache_equals_generation_without(family, cache, tmp_path):
    model = cut(family)
    model.save_pretrained(tmp_path)
    model = lc.load(tmp_path)
    ids = torch.tensor([[5, 9, 11, 6]])
    plain = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
    cached = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation=cache)
    assert torch.equal(plain, cached)


def test_a_loaded_model_is_a_float_model_like_any_other(tmp_path):
    cut("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert getattr(model, "hf_quantizer", None) is None
    assert not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "_is_quantized")
    assert quantized_by(model) is None
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert copy.deepcopy(model).to(torch.bfloat16).dtype == torch.bfloat16
    assert copy.deepcopy(model).half().dtype == torch.float16
    assert copy.deepcopy(model).half().float().dtype == torch.float32
    twin = copy.deepcopy(model)
    assert as_json(twin) == as_json(model)
    assert torch.equal(logits(twin), logits(model))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(lc.load(tmp_path / "again")), logits(model))


def test_the_trainer_of_transformers_takes_it_and_refuses_it_quantized(tmp_path):
    cut("bert").save_pretrained(tmp_path / "cut")
    model = lc.load(tmp_path / "cut")
    rows = [{"input_ids": [5, 6, 7, 8], "labels": index % 2} for index in range(4)]
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, before)
    lc.DynamicQuantization().compress(model, lc.Context())
    with pytest.raises(ValueError, match="quantized"):
        Trainer(model, arguments, train_dataset=rows)


def test_a_chain_prunes_distils_and_quantizes_and_its_folder_loads(tmp_path):
    model = tiny_model("llama")
    distil = lc.KnowledgeDistillation(steps=2, batch_size=4, max_length=16, precision="fp32")
    steps = [HandCut(), distil, lc.DynamicQuantization()]
    result = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    result.save_pretrained(tmp_path)
    again = lc.load(tmp_path)
    assert torch.equal(logits(again), logits(result.model))
    assert again.model.layers[0].mlp.up_proj.weight.shape == (96, 64)
    assert again.model.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert not result.report.steps[1].left


def test_a_loaded_model_is_pruned_distilled_and_evaluated_like_any_other(tmp_path):
    cut("llama").save_pretrained(tmp_path)
    model = lc.load(tmp_path)
    distil = lc.KnowledgeDistillation(steps=1, batch_size=4, max_length=16, precision="fp32")
    steps = [lc.MagnitudePruning(sparsity=0.5), distil]
    result = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert as_json(result.model) == as_json(model)
    result.save_pretrained(tmp_path / "next")
    assert torch.equal(logits(lc.load(tmp_path / "next")), logits(result.model))


def test_the_runner_follows_depth_and_takes_the_note_away_when_the_config_tells_all():
    class Depth(HandCut):
        kept: tuple[int, ...]

        def compress(self, model, context):
            keep_blocks(model, {"transformer.h": self.kept})
            return model

        def to_dict(self):
            return {"name": "depth"}

    sizes = lc.compress(tiny_model("gpt2"), [HandCut(), Depth(kept=(0,))], progress=False).model.config
    assert {path.split(".")[2] for path in sizes.quantization_config.sizes} == {"0"}
    plain = lc.compress(tiny_model("gpt2"), [HandCut(), Depth(kept=(1,))], progress=False).model
    assert "quantization_config" not in plain.config.to_dict()
    assert matches_config(plain)


def test_renumbered_blocks_keep_their_own_sizes(tmp_path):
    model = cut("llama")
    keep_blocks(model, {"model.layers": (1,)})
    mark(model)
    assert model.config.quantization_config.per_layer_config == {
        "0": {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    }
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(lc.load(tmp_path)), logits(model))


def test_a_killed_run_continues_behind_a_stage_with_sizes(tmp_path):
    model = tiny_model("gpt2")
    whole = lc.compress(model, [HandCut(), "magnitude_pruning"], progress=False).model
    lc.compress(model, [HandCut()], resume_dir=tmp_path, progress=False)
    resumed = lc.compress(model, [HandCut(), "magnitude_pruning"], resume_dir=tmp_path, progress=False).model
    assert torch.equal(logits(resumed), logits(whole))
    assert as_json(resumed) == as_json(whole)


def test_the_note_says_what_it_means_layer_by_layer():
    def told(family):
        return cut(family).config.quantization_config.per_layer_config

    assert told("bert") == {"0": {"num_attention_heads": 3}}
    assert told("gpt2") == {"0": {"num_attention_heads": 3}}
    assert told("llama") == {
        "0": {"intermediate_size": 96},
        "1": {"intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1},
    }
    assert told("mixtral") == {"0": {"intermediate_size": 64}, "1": {"intermediate_size": 96, "num_local_experts": 3}}
    assert told("t5") == {}


def test_base_models_read_folders_with_heads_and_the_reverse(tmp_path):
    model = cut("bert")
    inputs = tiny_inputs(model)
    model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    assert type(base) is BertModel
    with torch.inference_mode():
        expected = model.bert(**inputs).last_hidden_state
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = type(model).from_pretrained(tmp_path / "base")
        assert torch.equal(again.bert(**inputs).last_hidden_state, expected)
    assert module_sizes(again) == again.config.quantization_config.sizes == module_sizes(model)

    model = cut("t5")
    model.save_pretrained(tmp_path / "t5")
    encoder = T5EncoderModel.from_pretrained(tmp_path / "t5")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(encoder(ids).last_hidden_state, model.encoder(ids).last_hidden_state)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_oldest_format_that_can_tell_is_written(family, tmp_path):
    plain = lc.DynamicQuantization().compress(tiny_model(family), lc.Context())
    assert as_json(plain)["format_version"] == 1
    assert "sizes" not in as_json(plain)
    assert as_json(cut(family))["format_version"] == 2
    assert as_json(lc.DynamicQuantization().compress(cut(family), lc.Context()))["format_version"] == 2


def test_a_direct_call_quantizes_a_model_that_nobody_noted(tmp_path):
    model = tiny_model("gpt2")
    cut_gpt2(model)
    lc.DynamicQuantization().compress(model, lc.Context())
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert again.transformer.h[0].attn.c_attn.weight.shape == (144, 64)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: setattr(model.lm_head, "extra", nn.Linear(2, 2)), "module of only one"),
        (lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.zeros(128))), "tensor of only one"),
        (lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(65))), "not within"),
        (lambda model: setattr(model.model.norm, "weight", nn.Parameter(torch.ones(1, 64))), "not within"),
        (lambda model: setattr(model.model.rotary_emb, "inv_freq", torch.ones(4)), "no folder holds it"),
    ],
)
def test_what_no_folder_can_tell_is_refused_and_the_runner_says_so(change, words):
    model = tiny_model("llama")
    change(model)
    with pytest.raises(lc.UnsupportedModelError, match=words):
        mark(model)
    assert "quantization_config" not in model.config.to_dict()


def test_a_step_after_which_no_folder_loads_says_so_in_the_report():
    class Grow(HandCut):
        def compress(self, model, context):
            model.extra = nn.Linear(2, 2)
            return model

    record = lc.compress(tiny_model("llama"), Grow(), progress=False).report.steps[0]
    assert any("will not load" in (action.reason or "") and "extra" in action.reason for action in record.left)


def test_formats_of_others_cannot_hold_sizes():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(lc.UnsupportedModelError, match="uniform=True"):
        lc.compress(cut("llama"), lc.BitsAndBytesQuantization(), progress=False)


QUERY = "model.layers.1.self_attn.q_proj"
PLAIN = "model.layers.0.self_attn.q_proj"


def entry(tensors=None, attributes=None):
    return {"tensors": tensors or {}, "attributes": attributes or {}}


def put(path, value):
    return lambda config: config["sizes"].update({path: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: config.update(format_version=3), "upgrade it with pip"),
        (lambda config: config.update(sizes=[1]), "must be dicts"),
        (lambda config: config.update(per_layer_config=7), "must be dicts"),
        (put("model.nowhere", entry()), "model.nowhere"),
        (put(QUERY, None), "must hold tensors and attributes"),
        (put(QUERY, {"tensors": {}}), "must hold tensors and attributes"),
        (put(QUERY, entry() | {"code": "x"}), "must hold tensors and attributes"),
        (put(QUERY, {"tensors": [], "attributes": {}}), "must hold tensors and attributes"),
        (put(QUERY, entry({"secret": [1, 1]})), "has no tensor 'secret'"),
        (put(QUERY, entry({"weight": [65, 64]})), r"must be within \[64, 64\]"),
        (put(QUERY, entry({"weight": [10**12, 64]})), "must be within"),
        (put(QUERY, entry({"weight": [0, 64]})), "must be within"),
        (put(QUERY, entry({"weight": [-1, 64]})), "must be within"),
        (put(QUERY, entry({"weight": [64]})), "must be within"),
        (put(QUERY, entry({"weight": [32, 64, 1]})), "must be within"),
        (put(QUERY, entry({"weight": [32.0, 64]})), "must be within"),
        (put(QUERY, entry({"weight": [True, 64]})), "must be within"),
        (put(QUERY, entry({"weight": "32"})), "must be within"),
        (put("model.rotary_emb", entry({"inv_freq": [4]})), "not in any folder"),
        (put(QUERY, entry({}, {"forward": 1})), "no integer attribute 'forward'"),
        (put(QUERY, entry({}, {"__class__": 1})), "no integer attribute"),
        (put(QUERY, entry({}, {"_parameters": 1})), "no integer attribute"),
        (put(QUERY, entry({}, {"training": 0})), "no integer attribute"),
        (put(QUERY, entry({}, {"new": 1})), "no integer attribute"),
        (put(QUERY, entry({}, {"out_features": "32"})), "cannot become '32'"),
        (put(QUERY, entry({}, {"out_features": True})), "cannot become True"),
        (put(QUERY, entry({}, {"out_features": -1})), "cannot become -1"),
        (put(QUERY, entry({}, {"out_features": 10**9})), "cannot become"),
        (put(QUERY, entry({}, {"out_features": [32]})), "cannot become"),
        (put(PLAIN, entry({"weight": [32, 64]})), r"0.self_attn.q_proj.weight has the shape \(64, 64\), .* \(32, 64\)"),
        (
            lambda config: config["sizes"].pop(QUERY),
            r"1.self_attn.q_proj.weight has the shape \(32, 64\), where .* \(64",
        ),
    ],
)
def test_a_damaged_or_hostile_note_is_refused_before_anything_is_allocated(tmp_path, change, words):
    cut("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    change(content["quantization_config"])
    path.write_text(json.dumps(content))
    with pytest.raises(lc.CheckpointError, match=words):
        lc.load(tmp_path)
    with pytest.raises((lc.CheckpointError, RuntimeError, ValueError)):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_refused_note_changes_nothing():
    layer = nn.Linear(4, 4, device="meta")
    with pytest.raises(lc.CheckpointError, match="weight"):
        resize(nn.ModuleDict({"a": layer, "b": layer}), {"a": entry({"bias": [2]}), "b": entry({"weight": [9, 9]})})
    assert layer.bias.shape == (4,)


def test_tuples_and_embeddings_keep_their_kind():
    model = tiny_model("gpt2")
    keep_features(model.transformer.ln_f, torch.arange(32))
    keep_rows(model.transformer.wpe, torch.arange(48))
    sizes = module_sizes(model)
    assert sizes["transformer.ln_f"]["attributes"] == {"normalized_shape": [32]}
    fresh = tiny_model("gpt2")
    resize(fresh, json.loads(json.dumps(sizes)))
    assert fresh.transformer.ln_f.normalized_shape == (32,)
    assert fresh.transformer.wpe.num_embeddings == 48
    assert module_sizes(fresh) == sizes
