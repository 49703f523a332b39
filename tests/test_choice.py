"""Which layers become coded: what targets, skip and overrides name, and with each layer all that share its weight."""

import pytest
import torch

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

TIED = ["lm_head", "model.embed_tokens"]


def planned(step, model=None):
    plan = step.plan(model or tiny_model("llama"), lc.Context(data=[], tokenizer=tiny_tokenizer()))
    return {action.path: action for action in plan if action.path}


def touched(step, model=None):
    return sorted(path for path, action in planned(step, model).items() if action.touched)


def packed(**fields):
    return lc.WeightOnlyQuantization(**{"group_size": 32, **fields})


def untied():
    model = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    return model


@pytest.mark.parametrize("strategy", [lc.WeightOnlyQuantization, lc.GPTQ, lc.AWQ, lc.DynamicQuantization])
@pytest.mark.parametrize("pattern", ["lm_head", "*embed_tokens"])
def test_one_of_two_tied_layers_takes_the_other_along(strategy, pattern):
    fields = {} if strategy is lc.DynamicQuantization else {"group_size": 32}
    step = strategy(targets=(pattern,), **fields)
    plan = planned(step)
    assert sorted(path for path, action in plan.items() if action.touched) == TIED
    assert "shared with model.embed_tokens" in plan["lm_head"].reason
    assert plan["model.layers.0.mlp.up_proj"].reason == "not in targets"


def test_targets_name_embeddings():
    assert touched(packed(targets=("*embed_tokens",)), untied()) == ["model.embed_tokens"]
    small = lc.compress(untied(), packed(targets=("*embed_tokens",)), progress=False).model
    assert type(small.model.embed_tokens).__name__ == "PackedEmbedding"
    assert type(small.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("strategy", [lc.WeightOnlyQuantization, lc.GPTQ])
def test_overrides_give_bits_within_targets_and_take_in_no_other_layer(strategy):
    step = strategy(group_size=32, targets=("*.q_proj",), overrides={"*.0.*": 8})
    plan = planned(step)
    assert touched(step) == [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    assert "int8" in plan["model.layers.0.self_attn.q_proj"].does
    assert "int4" in plan["model.layers.1.self_attn.q_proj"].does
    assert plan["model.layers.0.mlp.up_proj"].reason == "not in targets"


def test_overrides_take_in_heads_where_no_targets_are_given():
    assert set(TIED) <= set(touched(packed(overrides={"lm_head": 8})))
    assert not set(TIED) & set(touched(packed()))


@pytest.mark.parametrize("bare", TIED)
def test_none_for_one_of_two_tied_layers_leaves_both(bare):
    other = next(name for name in TIED if name != bare)
    plan = planned(packed(overrides={bare: None, other: 3}))
    assert plan[bare].reason == f"overrides[{bare!r}] = None"
    assert plan[other].reason == f"shares its weight with {bare}, which stays in float: overrides[{bare!r}] = None"


def test_tied_layers_with_different_bits_are_refused():
    with pytest.raises(lc.ConfigError, match=r"model.embed_tokens and lm_head the same bits.*got 8 and 3"):
        planned(packed(overrides={"model.embed_tokens": 8, "lm_head": 3}))
    # What no override names follows the one that is named.
    plan = planned(packed(targets=("*",), overrides={"lm_head": 8}))
    assert "int8" in plan["model.embed_tokens"].does


def test_a_layer_that_refuses_itself_gives_its_own_reason():
    with pytest.raises(
        lc.NothingToCompressError, match=r"lm_head: shares its weight with model\.embed_tokens"
    ) as error:
        planned(packed(targets=("lm_head",), skip=("*embed*",)))
    assert "model.embed_tokens: skip='*embed*'" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"overrides": {"*.mlp.*": 8, "*.down_proj": 2}},
            r"\['\*\.down_proj'\] decides for no layer: .* by '\*\.mlp\.\*'",
        ),
        (
            {"overrides": {"lm_head": 8}, "targets": ("*.q_proj",)},
            r"gives 8 bits to no layer: lm_head .*not in targets",
        ),
        ({"bits": "auto", "target_bits": 2.2}, r"target_bits must be at least 2\.\d+ with group_size=32"),
        ({"bits": "auto", "target_bits": 4.5, "overrides": {"*": 8}}, "none to choose for"),
    ],
)
def test_what_cannot_be_is_refused_in_the_plan(fields, words):
    with pytest.raises(lc.ConfigError, match=words):
        planned(packed(**fields))


def test_a_target_that_cannot_be_met_is_refused_before_an_earlier_step_works():
    class Spy(lc.Compressor):
        def plan(self, model, context):
            return [lc.Action(path="", does="nothing")]

        def compress(self, model, context):
            raise AssertionError("worked")

    steps = [Spy(), packed(bits="auto", target_bits=2.2)]
    model = tiny_model("llama")
    with pytest.raises(lc.ConfigError, match="target_bits must be at least"):
        lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)


@pytest.mark.parametrize("bits", ["8", 8.0])
def test_bits_of_overrides_are_whole_numbers(bits):
    with pytest.raises(lc.ConfigError, match=r"overrides\['\*'\] must be in \[2, 8\]"):
        packed(overrides={"*": bits})


def test_what_is_skipped_stays_whatever_overrides_say():
    plan = planned(packed(skip=("*.q_proj",), overrides={"*.q_proj": 8}))
    assert plan["model.layers.0.self_attn.q_proj"].reason == "skip='*.q_proj'"
    assert plan["model.layers.0.self_attn.k_proj"].touched
