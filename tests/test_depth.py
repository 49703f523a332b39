"""Depth pruning: the right blocks go, what is left equals the bypassed model, and plain transformers loads it."""

import copy
import json

import pytest
import torch
import transformers

import llmcompress as lc
from llmcompress.anatomy.depth import keep_blocks
from llmcompress.anatomy.probe import probe_inputs, probe_outputs, relative_error
from llmcompress.anatomy.sizes import shapes_of
from llmcompress.anatomy.stacks import find_stacks
from llmcompress.compressor import Context
from llmcompress.distillation.layer_map import layer_map
from llmcompress.pruning.block_choice import legal_choice
from llmcompress.pruning.block_criteria import lowest_loss
from llmcompress.pruning.block_importance import losses_without, turning
from llmcompress.pruning.bypass import bypassed
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer

CRITERIA = ("block_influence", "angular_distance", "perplexity")
_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 128, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "initializer_range": 0.1,
}  # fmt: skip


def _model(name, kind="ForCausalLM", **fields):
    torch.manual_seed(0)
    config = "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config"
    model = getattr(transformers, f"{name}{kind}")(getattr(transformers, config)(**{**_SIZES, **fields}))
    return model.eval()


def _deep_bert(layers=4):
    torch.manual_seed(0)
    sizes = {key: _SIZES[key] for key in ("vocab_size", "hidden_size", "num_attention_heads", "intermediate_size")}
    config = transformers.BertConfig(**sizes, num_hidden_layers=layers, initializer_range=0.1)
    return transformers.BertForSequenceClassification(config).eval()


def _deep_t5(layers=3):
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_heads": 4, "vocab_size": 128}
    ids = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **ids, num_layers=layers)).eval()


def _compress(model, step):
    return lc.compress(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)


def _kept(model, step):
    """Return the indices kept by the stack's path, as the history tells them."""
    context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    step.compress(copy.deepcopy(model), context)
    return {cut.path: cut.kept for cut in context.history}


def _silence(model, index):
    """Make block `index` of a Llama put out just what it gets."""
    block = model.model.layers[index]
    with torch.no_grad():
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loses_a_block_as_predicted_and_loads_in_plain_transformers(family, tmp_path):
    model = tiny_model(family)
    step = lc.DepthPruning(criterion="last")
    assert not step.needs
    predicted = step.predicted_shapes(model)
    result = lc.compress(model, step, progress=False)
    assert shapes_of(result.model) == predicted
    assert [len(stack) for stack in find_stacks(result.model)] == [1] * len(find_stacks(model))
    result.model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = tiny_inputs(model)
    assert torch.equal(probe_outputs(loaded, inputs), probe_outputs(result.model, inputs))
    assert relative_error(probe_outputs(loaded, inputs), probe_outputs(model, inputs)) > 1e-3


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_block_that_does_nothing_goes_first(criterion):
    model = _model("Llama", "ForSequenceClassification")
    _silence(model, 1)
    result = _compress(model, lc.DepthPruning(layers=3, criterion=criterion))
    inputs = tiny_inputs(model)
    assert relative_error(probe_outputs(result.model, inputs), probe_outputs(model, inputs)) < 1e-6
    removed = [action.path for action in result.report.steps[0].touched if action.does == "removed"]
    assert removed == ["model.layers.1"]
    assert _kept(model, lc.DepthPruning(layers=3, criterion=criterion)) == {"model.layers": (0, 2, 3)}


@pytest.mark.parametrize("criterion", ["angular_distance", "perplexity"])
def test_several_blocks_go(criterion):
    model = _model("Llama", "ForSequenceClassification")
    _silence(model, 1)
    _silence(model, 2)
    assert _kept(model, lc.DepthPruning(ratio=0.5, criterion=criterion)) == {"model.layers": (0, 3)}


def test_angular_distance_takes_consecutive_blocks_and_influence_need_not():
    model = _model("Llama")
    _silence(model, 0)
    _silence(model, 2)
    assert _kept(model, lc.DepthPruning(layers=2)) == {"model.layers": (1, 3)}
    (kept,) = _kept(model, lc.DepthPruning(layers=2, criterion="angular_distance")).values()
    gone = sorted({0, 1, 2, 3} - set(kept))
    assert gone[1] == gone[0] + 1


def test_turning_is_what_the_hidden_states_say():
    model = _model("Llama")
    batches = [tiny_inputs(model), tiny_inputs(model, rows=1, tokens=5, seed=1)]
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
    # The last hidden state of transformers has passed the final norm, so the last block is left out of the comparison.
    for span, measure in ((1, "cosine"), (2, "angle")):
        found = turning(model, batches, {"model.layers": span}, find_stacks(model), measure=measure, who="test")
        for start in range(4 - span):
            before = torch.cat([state[start].flatten(0, 1) for state in states]).double()
            behind = torch.cat([state[start + span].flatten(0, 1) for state in states]).double()
            cosine = (before * behind).sum(-1) / before.norm(dim=-1) / behind.norm(dim=-1)
            expected = (1 - cosine if measure == "cosine" else cosine.arccos() / torch.pi).mean()
            assert found["model.layers"][start] == pytest.approx(float(expected), rel=1e-4)
        assert len(found["model.layers"]) == 5 - span


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_the_loss_without_a_block_is_that_of_the_model_cut(family):
    model = tiny_model(family)
    stack = find_stacks(model)[-1]
    inputs = tiny_inputs(model)
    (loss,) = losses_without(model, [inputs], [[stack.block_path(1)]], who="test")
    cut = copy.deepcopy(model)
    keep_blocks(cut, {stack.path: (0,)})
    tokens = inputs["decoder_input_ids" if family == "t5" else "input_ids"]
    logits = probe_outputs(cut, inputs)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_by_perplexity_the_blocks_go_one_after_the_other():
    model = _model("Llama")
    batches = [tiny_inputs(model, tokens=16)]
    choice = legal_choice(model, find_stacks(model)[0], 2)
    found = lowest_loss(model, batches, [choice], Context(progress=False), who="test")["model.layers"]
    left = [0, 1, 2, 3]
    while len(left) > 2:
        losses = {}
        for index in left:
            cut = copy.deepcopy(model)
            keep_blocks(cut, {"model.layers": [other for other in left if other != index]})
            tokens = batches[0]["input_ids"]
            losses[index] = cut(**batches[0], labels=tokens).loss.item()
        left.remove(min(losses, key=losses.get))
    assert found == tuple(left)


def test_a_classifiers_loss_is_its_divergence_from_the_model_as_it_is():
    model = tiny_model("bert")
    inputs = tiny_inputs(model)
    dense, loss = losses_without(model, [inputs], [[], ["bert.encoder.layer.0"]], who="test")
    with bypassed(model, ["bert.encoder.layer.0"]):
        ours = probe_outputs(model, inputs).log_softmax(-1)
    theirs = probe_outputs(model, inputs).log_softmax(-1)
    assert dense == 0
    assert loss == pytest.approx(float((theirs.exp() * (theirs - ours)).sum(-1).mean()), rel=1e-4)


def test_the_last_ones_go_but_for_the_very_last():
    assert _kept(_deep_bert(), lc.DepthPruning(layers=2, criterion="last")) == {"bert.encoder.layer": (0, 3)}
    assert _kept(_deep_bert(), lc.DepthPruning(layers=1, criterion="last")) == {"bert.encoder.layer": (0,)}
    assert _kept(_deep_bert(), lc.DepthPruning(layers=(1, 2))) == {"bert.encoder.layer": (1, 2)}


@pytest.mark.parametrize(("ratio", "keep"), [(None, 3), (0.01, 3), (0.5, 2), (0.99, 1)])
def test_a_ratio_removes_one_block_at_least_and_leaves_one(ratio, keep):
    model = _deep_bert()
    result = _compress(model, lc.DepthPruning(ratio=ratio))
    assert result.model.config.num_hidden_layers == keep


@pytest.mark.parametrize("criterion", [*CRITERIA, "last"])
def test_t5_keeps_the_block_with_the_position_bias_and_says_so(criterion):
    model = _deep_t5()
    with torch.no_grad():
        for name, parameter in model.encoder.block[0].named_parameters():
            if name.endswith(("o.weight", "wo.weight")):
                parameter.zero_()  # no block does less, and yet it must stay
    step = lc.DepthPruning(layers=2, criterion=criterion)
    kept = _kept(model, step)
    assert kept["encoder.block"][0] == kept["decoder.block"][0] == 0
    result = _compress(model, step)
    assert result.model.config.num_layers == result.model.config.num_decoder_layers == 2
    reasons = " ".join(action.reason or "" for action in result.report.steps[0].touched)
    if criterion == "block_influence":
        assert "by the criterion 0 would go" in reasons
    if criterion == "angular_distance":
        assert "these cannot be left out" in reasons
    with pytest.raises(lc.UnsupportedModelError, match="keep block 0"):
        _compress(model, lc.DepthPruning(layers=(1, 2)))


def test_one_side_of_an_encoder_decoder():
    result = _compress(_deep_t5(), lc.DepthPruning(layers=1, targets=("decoder.*",)))
    assert (result.model.config.num_layers, result.model.config.num_decoder_layers) == (3, 1)
    assert [(action.path, action.reason) for action in result.report.steps[0].left] == [
        ("encoder.block", "not among the targets")
    ]
    result.model.generate(tiny_inputs(result.model)["input_ids"], max_new_tokens=3)
    # Its cache has as many places as the encoder has blocks.
    with pytest.raises(lc.UnsupportedModelError, match="takes the encoder's depth, 1, for that of the decoder, 3"):
        _compress(_deep_t5(), lc.DepthPruning(layers=1, targets=("encoder.*",)))


HYBRIDS = {
    "Qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2},
    "Gemma2": {"head_dim": 16, "sliding_window": 4, "query_pre_attn_scalar": 16},
    "Gemma3": {"head_dim": 16, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "GptOss": {"num_local_experts": 4, "head_dim": 16, "sliding_window": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "Bamba": {
        "attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_expand": 2,
    },
    "Qwen3Next": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16,
        "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
        "linear_key_head_dim": 16, "linear_value_head_dim": 16, "full_attention_interval": 2,
    },
    "DeepseekV3": {
        "first_k_dense_replace": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
        "moe_intermediate_size": 32, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4, "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("criterion", ["block_influence", "last"])
def test_blocks_of_several_kinds_keep_theirs_and_find_their_cache(name, criterion, tmp_path):
    model = _model(name, **HYBRIDS[name])
    result = _compress(model, lc.DepthPruning(layers=2, criterion=criterion))
    shallow = result.model.eval()
    kinds = getattr(model.config, "layer_types", None)
    (kept,) = _kept(model, lc.DepthPruning(layers=2, criterion=criterion)).values()
    assert kinds is None or list(shallow.config.layer_types) == [kinds[index] for index in kept]
    prompt = tiny_inputs(shallow, rows=1, tokens=9)  # longer than the sliding windows
    new = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(shallow.generate(**prompt, **new, use_cache=cache) for cache in (True, False)))
    shallow.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**prompt).logits, shallow(**prompt).logits)
    assert torch.equal(loaded.generate(**prompt, **new), shallow.generate(**prompt, **new))


def test_where_the_place_decides_the_kind_the_choice_keeps_the_pattern():
    model = _model("Bamba", **HYBRIDS["Bamba"])
    choice = legal_choice(model, find_stacks(model)[0], 2)
    assert choice.dearest([4.0, 1.0, 3.0, 2.0]) == (0, 3)  # a mamba block before an attention
    assert choice.dearest([1.0, 1.0, 4.0, 4.0]) == (2, 3)
    free = _model("Gemma2", **HYBRIDS["Gemma2"])
    assert legal_choice(free, find_stacks(free)[0], 2).dearest([4.0, 1.0, 3.0, 2.0]) == (0, 2)


@pytest.mark.parametrize("model", [_deep_bert, lambda: _model("Llama")], ids=["bert", "llama"])
def test_distillation_afterwards_maps_the_layers_by_itself(model, monkeypatch):
    maps = []

    def spy(*args, **planned):
        maps.append(layer_map(*args, **planned))
        return maps[-1]

    monkeypatch.setattr("llmcompress.distillation.distillation.layer_map", spy)
    model = model()
    distil = lc.KnowledgeDistillation(steps=2, batch_size=4, max_length=16, features={"hidden": 1.0}, precision="fp32")
    result = _compress(model, [lc.DepthPruning(layers=(0, 2)), distil])
    assert maps[-1] == [((0, 1), (1, 3))]  # block 0 answers for the teacher's 0 and 1, block 2 for 2 and 3
    assert result.model.config.num_hidden_layers == 2


def test_after_per_layer_sizes_the_folder_still_loads(tmp_path):
    model = _deep_bert()
    result = _compress(model, [lc.StructuredPruning(heads=0.5, uniform=False), lc.DepthPruning(layers=(1, 3))])
    result.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    inputs = tiny_inputs(model)
    assert torch.equal(probe_outputs(loaded, inputs), probe_outputs(result.model, inputs))


def test_a_bypassed_block_hands_its_input_on_and_is_itself_again_afterwards():
    model = tiny_model("t5")
    inputs = tiny_inputs(model)
    before = probe_outputs(model, inputs)
    cut = copy.deepcopy(model)
    keep_blocks(cut, {"encoder.block": (0,), "decoder.block": (0,)})
    with bypassed(model, ["encoder.block.1", "decoder.block.1"]):
        assert relative_error(probe_outputs(model, inputs), probe_outputs(cut, inputs)) < 1e-6
    assert torch.equal(probe_outputs(model, inputs), before)


def test_blocks_that_depend_on_their_number_stay_where_they_are():
    config = transformers.GPT2Config(
        vocab_size=128, n_embd=64, n_layer=3, n_head=4, scale_attn_by_inverse_layer_idx=True, bos_token_id=2,
        eos_token_id=3,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(lc.UnsupportedModelError, match=r"scaling is .* which its config cannot tell"):
        lc.compress(model, lc.DepthPruning(layers=(1, 2)), progress=False)
    result = lc.compress(model, lc.DepthPruning(layers=2, criterion="last"), progress=False)
    assert "by the criterion 1 would go" in result.report.steps[0].touched[0].reason
    assert torch.equal(result.model.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_cut_of_the_wrong_blocks_is_withheld(monkeypatch, inplace):
    def wrong(model, kept):
        return keep_blocks(model, dict.fromkeys(kept, (1,)))

    monkeypatch.setattr("llmcompress.pruning.depth.keep_blocks", wrong)
    model = tiny_model("llama")
    with pytest.raises(lc.UnsupportedModelError, match=r"differs from the deep one with model\.layers\.1 bypassed"):
        lc.compress(model, lc.DepthPruning(layers=(0,)), progress=False, inplace=inplace)
    assert inplace or len(model.model.layers) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3, "ratio": 0.5}, r"must have layers or ratio, not both, got layers=3 and ratio=0\.5"),
        ({"layers": 0}, r"must keep at least one block, got 0"),
        ({"layers": (2, 1)}, r"ascending order from 0, got \(2, 1\)"),
        ({"layers": ()}, r"ascending order"),
        ({"layers": (-1, 2)}, r"ascending order"),
        ({"ratio": 1.0}, r"ratio must be in \(0, 1\), got 1\.0"),
        ({"criterion": "first"}, r"criterion must be"),
    ],
)
def test_bad_fields_are_refused_on_construction(fields, message):
    with pytest.raises(lc.ConfigError, match=rf"DepthPruning.*{message}"):
        lc.DepthPruning(**fields)


def test_what_a_model_cannot_do_is_refused_before_work():
    model = _deep_bert()
    with pytest.raises(lc.ConfigError, match=r"below the number of blocks, got 9; bert.encoder.layer of .* has 4"):
        _compress(model, lc.DepthPruning(layers=9))
    with pytest.raises(lc.ConfigError, match=r"blocks that are there, got \(0, 7\); bert.encoder.layer of .* has 4"):
        _compress(model, lc.DepthPruning(layers=(0, 7)))
    with pytest.raises(lc.NothingToCompressError, match=r"has 4 blocks, and all are to stay"):
        _compress(model, lc.DepthPruning(layers=4))
    with pytest.raises(lc.NothingToCompressError, match=r"matches 'decoder\.\*'; it has: bert\.encoder\.layer"):
        _compress(model, lc.DepthPruning(targets=("decoder.*",)))
    with pytest.raises(lc.MissingInputError, match=r"DepthPruning needs data"):
        lc.compress(model, lc.DepthPruning(layers=2), tokenizer=tiny_tokenizer(), progress=False)
    with pytest.raises(lc.MissingInputError, match=r"DepthPruning needs a tokenizer"):
        lc.compress(model, lc.DepthPruning(layers=2), data=tiny_data(model), progress=False)
    assert len(model.bert.encoder.layer) == 4


def test_image_models_lose_blocks_without_data(tmp_path):
    model = tiny_model("vit")
    result = lc.compress(model, lc.DepthPruning(layers=(1,)), progress=False)
    result.model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(probe_outputs(loaded, probe_inputs(model)), probe_outputs(result.model, probe_inputs(model)))
    with pytest.raises(
        lc.UnsupportedModelError, match=r"calibrates on texts, .* reads pixel_values; use criterion='la"
    ):
        _compress(model, lc.DepthPruning())


def test_damaged_weights_are_named():
    model = _model("Llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(lc.CompressionError, match=r"model\.layers\.2 puts out NaN"):
        _compress(model, lc.DepthPruning(layers=2))
    with pytest.raises(lc.CompressionError, match=r"the loss of LlamaForCausalLM on the calibration texts is inf"):
        _compress(model, lc.DepthPruning(layers=2, targets=("model.layers",), criterion="perplexity"))
