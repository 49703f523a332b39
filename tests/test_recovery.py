"""Distillation behind every step: where it is put, what it gives back, what it cannot."""

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.layers import weight_layers
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

RECOVER = lc.KnowledgeDistillation(
    steps=40, alpha=1.0, learning_rate=3e-3, batch_size=8, max_length=24, precision="fp32"
)


def names(chain):
    return [type(step).__name__ for step in chain.flatten()]


def test_recovery_stands_behind_what_leaves_float_weights_and_before_what_it_can_train_for():
    quantize = lc.WeightOnlyQuantization(bits=4)
    chain = lc.Pipeline(steps=[lc.MagnitudePruning(), lc.StructuredPruning(), quantize], recover=RECOVER)
    between = "KnowledgeDistillation"
    assert names(chain) == ["MagnitudePruning", between, "StructuredPruning", between, "WeightOnlyQuantization"]
    assert [step.quantize_for for step in chain.flatten()[1::2]] == [None, quantize]
    assert names(lc.Pipeline(steps=[quantize], recover=RECOVER)) == ["KnowledgeDistillation", "WeightOnlyQuantization"]
    own = lc.KnowledgeDistillation(steps=1)
    chain = lc.Pipeline(steps=[lc.MagnitudePruning(), own, quantize], recover=RECOVER)
    assert chain.flatten() == [lc.MagnitudePruning(), own, quantize]
    nested = lc.Pipeline(steps=[lc.Pipeline(steps=[lc.MagnitudePruning()], recover=RECOVER), lc.GPTQ()])
    assert names(nested) == ["MagnitudePruning", "KnowledgeDistillation", "GPTQ"]
    assert lc.Pipeline.from_dict(nested.to_dict()) == nested
    assert lc.Pipeline(steps=["gptq"], recover={"name": "knowledge_distillation", "steps": 3}).recover.steps == 3


def test_a_recovery_that_is_none_is_refused():
    with pytest.raises(lc.ConfigError, match="must be a KnowledgeDistillation"):
        lc.Pipeline(steps=["gptq"], recover="magnitude_pruning")
    with pytest.raises(lc.ConfigError, match="student='layers:1'; make the student in a step of its own"):
        lc.Pipeline(steps=["gptq"], recover=lc.KnowledgeDistillation(steps=1, student="layers:1"))


def distance(teacher, model):
    tokens = torch.tensor([tiny_tokenizer()("a cat sat on a mat and ran")["input_ids"]])
    with torch.no_grad():
        ours, theirs = (torch.log_softmax(one(tokens).logits, -1) for one in (model, teacher))
    return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def zeros_of(model):
    layers = [layer for layer in weight_layers(model) if layer.kind != "embedding" and layer.tied_to is None]
    return [int((layer.weight == 0).sum()) for layer in layers]


@pytest.mark.parametrize("step", [lc.MagnitudePruning(pattern="2:4"), lc.WeightOnlyQuantization(bits=3, group_size=32)])
def test_more_than_half_of_what_was_lost_comes_back(step):
    torch.manual_seed(0)
    teacher = tiny_model("llama")
    with torch.no_grad():  # a random model hardly answers; a louder one has something to lose
        for layer in weight_layers(teacher):
            layer.weight.mul_(4)
    given = {"data": tiny_data(teacher, rows=24), "tokenizer": tiny_tokenizer(), "progress": False}
    lost = lc.compress(teacher, step, **given).model
    result = lc.compress(teacher, step, recover=RECOVER, **given)
    assert distance(teacher, result.model) < 0.5 * distance(teacher, lost)
    assert result.report.recipe["recover"] == RECOVER.to_dict()
    assert len(result.report.steps) == 2
    if isinstance(step, lc.MagnitudePruning):
        assert zeros_of(result.model) == zeros_of(lost)


def test_what_cannot_be_recovered_is_told():
    model = tiny_model("llama")
    given = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False}
    chain = lc.Pipeline(steps=[lc.GPTQ(group_size=32)], recover=RECOVER)
    assert [action.reason for action in chain.plan(model, lc.Context(**given)) if "not recovered" in str(action.reason)]
    result = lc.compress(model, chain.steps, recover=RECOVER, **given)
    assert any("not recovered: the weights are no longer float" in line for line in result.report.remarks())
    with pytest.raises(lc.MissingInputError, match="KnowledgeDistillation needs data"):
        lc.compress(model, lc.MagnitudePruning(), recover=RECOVER)
