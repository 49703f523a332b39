"""compare(): ratios and pairs by hand, sources of models, and refusals before any work."""

from __future__ import annotations

import copy

import pytest
import torch

import llmcompress as lc
from llmcompress.errors import CheckpointError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation import cost
from llmcompress.evaluation.memory import Memory
from llmcompress.testing import tiny_model

TEXT = "a quick brown fox jumps over the lazy dog, again and again. "
ROWS = [(TEXT[: 3 + (11 * i) % 50], i % 2) for i in range(24)]


def compare(models, task, **settings):
    return lc.compare(models, task, progress=False, **{"latency": False, **settings})


def inverted(model):
    """A copy that answers the opposite of a two-class model, always."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.neg_()
        other.classifier.bias.neg_()
    return other


def test_pairs_are_counted_example_by_example(tokenizer) -> None:
    base = tiny_model("bert")
    models = {"base": base, "same": copy.deepcopy(base), "opposite": inverted(base)}
    found = compare(models, lc.TextClassification(ROWS), tokenizer=tokenizer)
    right = sum(found.base.evaluation.score.right)
    same, opposite = found["same"].change, found["opposite"].change
    assert (same.flips[0].agreement, same.flips[0].right_to_wrong, same.flips[0].p_value) == (1.0, 0, 1.0)
    assert found.test("same", "accuracy").change == 0.0
    assert same.fidelity[0].kl_mean == pytest.approx(0, abs=1e-6)
    assert same.fidelity[0].top1_agreement == 1.0
    assert opposite.flips[0].agreement == 0.0
    assert (opposite.flips[0].right_to_wrong, opposite.flips[0].wrong_to_right) == (right, len(ROWS) - right)
    assert found.test("opposite", "accuracy").change == pytest.approx((len(ROWS) - 2 * right) / len(ROWS))


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classes_in_another_order_are_compared_by_name(tokenizer, problem) -> None:
    base = tiny_model("bert")
    base.config.id2label, base.config.label2id = {0: "bad", 1: "good"}, {"bad": 0, "good": 1}
    base.config.problem_type = problem
    turned = copy.deepcopy(base)
    turned.config.id2label, turned.config.label2id = {0: "good", 1: "bad"}, {"good": 0, "bad": 1}
    with torch.no_grad():
        for parameter in (turned.classifier.weight, turned.classifier.bias):
            parameter.copy_(parameter.flip(0))
    single = problem.startswith("single")
    rows = [(text, ["bad", "good"][label] if single else ["bad", "good"][: label + 1]) for text, label in ROWS]
    task = lc.TextClassification(rows, average="binary" if single else "macro")
    found = compare({"base": base, "turned": turned}, task, tokenizer=tokenizer)
    score, change = found["turned"].evaluation.score, found["turned"].change
    assert score.metrics == found.base.evaluation.score.metrics
    assert score.classes == ("bad", "good")
    assert [one.prediction for one in score.examples] == [
        one.prediction for one in found.base.evaluation.score.examples
    ]
    assert change.fidelity[0].top1_agreement == 1
    assert change.fidelity[0].kl_mean == pytest.approx(0, abs=1e-6)
    if single:
        assert change.flips[0].agreement == 1
        assert "another order" not in str(found)
        numbers = lc.TextClassification(ROWS)
        assert "another order" in str(compare({"base": base, "turned": turned}, numbers, tokenizer=tokenizer))


def test_sizes_are_ratios_to_the_base(tokenizer) -> None:
    base = tiny_model("bert")
    half = copy.deepcopy(base)
    for name, parameter in half.named_parameters():
        if "encoder" in name and parameter.dim() == 2:
            parameter.data[: len(parameter) // 2] = 0
    bf16 = copy.deepcopy(base).bfloat16()
    found = compare({"base": base, "zeros": half, "bf16": bf16}, lc.TextClassification(ROWS), tokenizer=tokenizer)
    assert found["zeros"].change.smaller_on_disk == 1.0
    assert found["zeros"].change.fewer_weights > 1.3
    assert 1.8 < found["bf16"].change.smaller_on_disk <= 2.0
    assert found["bf16"].change.fewer_weights == pytest.approx(1.0, abs=0.01)


def test_another_base_can_be_named_and_comes_first(tokenizer) -> None:
    models = {"small": tiny_model("distilbert"), "big": tiny_model("bert")}
    found = compare(models, lc.TextClassification(ROWS), tokenizer=tokenizer, base="big")
    assert [entry.name for entry in found.entries] == ["big", "small"]
    assert found.base.change is None
    with pytest.raises(ConfigError, match="base must be one of 'small', 'big', got 'bigg'"):
        compare(models, lc.TextClassification(ROWS), tokenizer=tokenizer, base="bigg")
    with pytest.raises(ConfigError, match="did you mean 'small'"):
        found["smal"]


def test_models_come_from_folders_and_results_too(tmp_path, tokenizer) -> None:
    base = tiny_model("bert")
    base.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    result = lc.Result(model=copy.deepcopy(base), report=None, tokenizer=tokenizer)  # type: ignore[arg-type]
    found = compare({"folder": str(tmp_path), "path": tmp_path, "result": result}, lc.TextClassification(ROWS))
    assert found["result"].change.flips[0].agreement == 1.0
    assert found["path"].evaluation.size == found["folder"].evaluation.size
    assert found["folder"].evaluation.size.from_files
    assert not found["result"].evaluation.size.from_files


def test_a_language_model_is_not_taken_for_a_result(tokenizer) -> None:
    # LlamaForCausalLM has a `.model` of its own.
    models = {"a": tiny_model("llama"), "b": tiny_model("llama", seed=1)}
    task = lc.LanguageModeling([TEXT * 3], window=32)
    found = compare(models, task, tokenizer=tokenizer)
    assert found.base.evaluation.model == "LlamaForCausalLM"
    assert found["b"].change.flips == (None,)
    assert "perplexity" in str(found)
    assert "windows" in found.to_html()


def test_latency_is_measured_for_all_in_the_same_turns(tokenizer) -> None:
    base = tiny_model("bert")
    shapes = [(1, 4), (2, 8)]
    found = compare({"a": base, "b": base}, lc.TextClassification(ROWS[:4]), tokenizer=tokenizer, latency=shapes)
    for entry in found.entries:
        assert [(one.batch_size, one.tokens) for one in entry.evaluation.latency] == shapes
    turns = [len(entry.evaluation.latency[0].turns_ms) for entry in found.entries]
    assert turns[0] == turns[1] >= 10
    assert [(one.batch_size, one.tokens) for one in found["b"].change.faster] == shapes
    assert "latency 1x4" in str(found)


def test_memory_is_measured_when_asked_for(tokenizer, monkeypatch) -> None:
    sizes = {"baseline_bytes": 10, "load_peak_bytes": 30, "inference_peak_bytes": 40, "cuda_peak_bytes": None}
    memory = Memory(**sizes, batch_size=1, tokens=8)
    monkeypatch.setattr(cost, "measure_memory", lambda model, **_: memory)  # its own tests start the process
    found = compare({"only": tiny_model("bert")}, lc.TextClassification(ROWS[:4]), tokenizer=tokenizer, memory=True)
    assert found.base.evaluation.memory == memory
    assert "peak memory" in str(found)
    assert "peak, loading" in found.to_html()


def test_several_tasks_stand_side_by_side(tokenizer) -> None:
    tasks = [lc.TextClassification(ROWS), lc.TextClassification(ROWS[:6])]
    found = compare({"a": tiny_model("bert"), "b": tiny_model("bert", seed=1)}, tasks, tokenizer=tokenizer)
    assert len(found["b"].change.tests) == len(found["b"].change.flips) == 2
    assert lc.Comparison.from_json(found.to_json()) == found


def test_everything_is_refused_before_any_work(tokenizer, monkeypatch) -> None:
    task = lc.TextClassification(ROWS)
    monkeypatch.setattr(lc.TextClassification, "evaluate", lambda *_, **__: pytest.fail("work was done"))
    with pytest.raises(MissingInputError, match="at least one model"):
        compare({}, task, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"models must be a dict of models by name, got \["):
        compare([tiny_model("bert")], task, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="names that differ as texts, got 1 and '1'"):
        compare({1: tiny_model("bert"), "1": tiny_model("bert", seed=1)}, task, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"models\['b'\]: model must be a transformers model"):
        compare({"a": tiny_model("bert"), "b": 3}, task, tokenizer=tokenizer)
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM"):
        compare({"a": tiny_model("bert"), "b": tiny_model("llama")}, task, tokenizer=tokenizer)
    with pytest.raises(MissingInputError, match="needs a tokenizer"):
        compare({"a": tiny_model("bert")}, task)
    with pytest.raises(ConfigError, match="at most 512 tokens"):
        compare({"a": tiny_model("bert")}, task, tokenizer=tokenizer, latency=[(1, 4096)])
    with pytest.raises(ConfigError, match="task must be a Task or a list of them, got 'text_classification'"):
        compare({"a": tiny_model("bert")}, "text_classification", tokenizer=tokenizer)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"format_version": 2}'])
def test_a_foreign_document_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="no comparison of format 1"):
        lc.Comparison.from_json(text)
