"""Plans of pruning say what is done: shared weights, numbers of zeros, zeros of earlier steps, refusals in time."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import llmcompress as lc
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

PRUNERS = [lc.MagnitudePruning, lc.WandaPruning, lc.SparseGPTPruning]


def compressed(model, *steps, data=None):
    data = data or tiny_data(model)
    return lc.compress(model, list(steps), data=data, tokenizer=tiny_tokenizer(), progress=False)


def zeros_of(weight):
    return int((weight == 0).sum())


# -- shared weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", PRUNERS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_head_that_shares_the_embedding_is_left_and_told(strategy, family):
    model = tiny_model(family)
    result = compressed(model, strategy(targets=("*",)))
    assert torch.equal(result.model.get_input_embeddings().weight, model.get_input_embeddings().weight)
    left = {action.path: action.reason for action in result.report.steps[0].left}
    assert left["lm_head"].startswith("shares its weight with ")
    with pytest.raises(lc.NothingToCompressError, match=r"lm_head: shares its weight with .* does not change"):
        compressed(model, strategy(targets=("lm_head",)))


@pytest.mark.parametrize("strategy", PRUNERS)
def test_blocks_that_share_a_weight_are_pruned_once(strategy):
    model = tiny_model("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    step = strategy(targets=("*.down_proj",), overrides={"*.0.*": 0.25, "*.1.*": 0.75})
    result = compressed(model, step)
    assert zeros_of(result.model.model.layers[1].mlp.down_proj.weight) == first.down_proj.weight.numel() // 4
    done = {action.path: action.does for action in result.report.steps[0].touched}
    assert done["model.layers.1.mlp.down_proj"] == "the zeros of model.layers.0.mlp.down_proj, whose weight it shares"


# -- numbers of zeros -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.003, 0.3, 0.995])
@pytest.mark.parametrize("strategy", PRUNERS)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_plans_count_zeros_exactly(strategy, sparsity, family):
    model = tiny_model(family)
    step = strategy(sparsity=sparsity)
    planned = lc.plan(model, step, data=tiny_data(model), tokenizer=tiny_tokenizer())
    result = compressed(model, step)
    assert planned.steps[0].size.zeros == pytest.approx(result.report.steps[0].footprint.zeros, abs=1e-9)
    for action in result.report.steps[0].touched:
        if action.path:
            path, _, parameter = (
                action.path.rpartition(".") if "experts" in action.path else (action.path, "", "weight")
            )
            weight = getattr(result.model.get_submodule(path), parameter)
            parts = len(weight) if weight.dim() == 3 and strategy is not lc.MagnitudePruning else 1
            assert zeros_of(weight) == parts * round(sparsity * (weight.numel() // parts))


def test_wanda_spreads_what_no_row_can_have_alone():
    result = compressed(tiny_model("llama"), lc.WandaPruning(sparsity=0.3))
    rows = (result.model.model.layers[0].mlp.up_proj.weight == 0).sum(1)
    assert set(rows.tolist()) == {19, 20}


def test_a_share_of_less_than_one_weight_is_refused():
    with pytest.raises(lc.NothingToCompressError, match="is less than one"):
        compressed(tiny_model("llama"), lc.MagnitudePruning(sparsity=1e-5))


@pytest.mark.parametrize(
    ("first", "second", "exact"),
    [
        (lc.MagnitudePruning(), lc.MagnitudePruning(pattern="2:4"), False),
        (lc.MagnitudePruning(), lc.WandaPruning(), False),
        (lc.MagnitudePruning(), lc.MagnitudePruning(sparsity=0.7), True),
    ],
)
def test_zeros_that_may_overlap_are_estimates(first, second, exact):
    model = tiny_model("llama")
    planned = lc.plan(model, [first, second], data=tiny_data(model), tokenizer=tiny_tokenizer())
    assert (planned.steps[1].estimated is None) is exact
    if exact:
        found = compressed(model, first, second).report.steps[1].footprint.zeros
        assert planned.steps[1].size.zeros == pytest.approx(found, abs=1e-9)


@pytest.mark.parametrize("second", [{"sparsity": 0.6}, {"pattern": "1:4"}])
def test_sparsegpt_keeps_the_zeros_of_an_earlier_step(second):
    result = compressed(tiny_model("llama"), lc.MagnitudePruning(pattern="2:4"), lc.SparseGPTPruning(**second))
    weight = result.model.model.layers[0].self_attn.q_proj.weight
    assert ((weight == 0).unflatten(1, (-1, 4)).sum(-1) >= 2).all()
    assert zeros_of(weight) >= (0.6 if "sparsity" in second else 0.75) * weight.numel() - 1


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step",
    [
        lc.VocabularyPruning(round_to=1),
        lc.DepthPruning(layers=(0,)),
        lc.StructuredPruning(heads=0.5),
        lc.StructuredPruning(hidden=0.25),
    ],
)
def test_outputs_that_are_not_finite_are_told_as_such(step):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(lc.CompressionError, match=r"hold NaN or infinity.*repair the checkpoint first"):
        compressed(model, step)


def test_heads_with_position_biases_of_their_own_are_refused_in_the_plan():
    model = build_tiny("causal-lm", "bloom")
    step = lc.StructuredPruning(heads=0.5, uniform=False)
    with pytest.raises(lc.UnsupportedModelError, match="does not run with fewer of these parts"):
        lc.plan(model, step)
    # Others run.
    assert lc.plan(tiny_model("llama"), step).steps[0].touched


def test_vocabularies_of_models_with_few_positions_are_cut():
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, n_positions=8, bos_token_id=2, eos_token_id=3)
    torch.manual_seed(0)
    result = compressed(GPT2LMHeadModel(config), lc.VocabularyPruning(round_to=1), data=["a cat sat on a mat " * 6] * 4)
    assert result.model.config.vocab_size < 128


@pytest.mark.parametrize("earlier", [{"ffn": 0.3}, {"ffn": 0.3, "heads": 0.5}])
def test_vocabularies_are_cut_behind_sizes_that_no_config_tells(earlier, tmp_path):
    model = tiny_model("llama")
    steps = [lc.StructuredPruning(**earlier, uniform=False), lc.VocabularyPruning(corpus=("a cat sat",), round_to=1)]
    planned = lc.plan(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer())
    result = compressed(model, *steps)
    assert result.model.config.vocab_size == 9
    assert planned.steps[1].size.parameters == sum(p.numel() for p in result.model.parameters())
    result.save_pretrained(tmp_path)
    again = lc.load(tmp_path)
    assert again.model.embed_tokens.weight.shape == (9, 64)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, result.model(ids).logits)


def test_what_round_to_does_is_told():
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    with pytest.raises(lc.NothingToCompressError, match=r"\d are seen in the texts.*round_to=1024 fills up the rest"):
        lc.compress(model, lc.VocabularyPruning(corpus=("a cat",), round_to=1024), tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: lc.DepthPruning(layers=True), r"DepthPruning\.layers must be a number, got True"),
        (lambda: lc.DepthPruning(layers=(False, True)), r"DepthPruning\.layers must be of numbers"),
        (lambda: lc.MagnitudePruning(overrides={"*": False}), r"MagnitudePruning\.overrides must be of numbers"),
        (lambda: lc.StructuredPruning(floor=0.9), r"floor must be left out with scope='layer'"),
        (lambda: lc.WandaPruning(owl_m=9), r"owl_m must be left out with allocation='uniform'"),
    ],
)
def test_fields_that_would_do_nothing_or_something_else_are_refused(make, words):
    with pytest.raises(lc.ConfigError, match=words):
        make()


def test_an_empty_list_of_targets_is_named():
    with pytest.raises(lc.NothingToCompressError, match=r"matching \(\)"):
        compressed(tiny_model("llama"), lc.MagnitudePruning(targets=()))


def test_a_tied_zero_is_none_that_training_could_lose():
    """What is not pruned needs no holding: the head that shares the embedding's weight stays dense all along."""
    model = tiny_model("llama")
    result = compressed(model, lc.MagnitudePruning(targets=("*",)), lc.KnowledgeDistillation(steps=2))
    assert zeros_of(result.model.lm_head.weight) == 0
    assert isinstance(result.model.lm_head, nn.Linear)
    assert zeros_of(result.model.model.layers[0].mlp.up_proj.weight) == 64 * 128 // 2


def test_steps_behind_zeros_that_may_overlap_are_checked_on_what_they_will_get(monkeypatch):
    """The sizes are exact all the same: what the last step cannot take is refused before the first one works."""
    monkeypatch.setattr(lc.MagnitudePruning, "compress", lambda *_: pytest.fail("this worked already"))
    steps = [lc.MagnitudePruning(), lc.WandaPruning(), lc.DepthPruning(layers=1), lc.DepthPruning(layers=(0, 1))]
    with pytest.raises(lc.CompressionError, match=r"blocks that are there|all are to stay"):
        compressed(tiny_model("llama"), *steps)
