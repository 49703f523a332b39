"""Gates: each held against a hand-computed loss, broken stages caught, and what a run does then."""

import json

import pytest
import torch
import yaml

import llmcompress as lc
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.gates import Evidence, Verdict
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

STEPS = [lc.MagnitudePruning(sparsity=0.1, targets=("*.dense",)), "zero_classifier", "dynamic_quantization"]
# Answers change wherever the classifier is all zeros: then one label is given to all.
AGREE = lc.MinAgreement(0.9)


@pytest.fixture(scope="module", autouse=True)
def zero_classifier():
    """A broken strategy: it zeroes the layer that answers."""

    @lc.register("zero_classifier")
    class ZeroClassifier(lc.Compressor):
        def compress(self, model, context):
            for parameter in model.get_submodule("classifier").parameters():
                parameter.data.zero_()
            context.history.append(lc.Cut("classifier", "ffn", (0,), 1))
            return model

    return ZeroClassifier


@pytest.fixture
def bert():
    return tiny_model("bert")


@pytest.fixture
def task(bert):
    """Labels that are the model's own answers, about half of each class."""
    texts = [example.text for example in tiny_data(bert)] + [f"{word} {word} again" for word in "abcdefghijkl"]
    found = lc.evaluate(
        bert,
        lc.TextClassification([(text, 0) for text in texts]),
        tokenizer=tiny_tokenizer(),
        latency=False,
        progress=False,
    )
    labels = [example.prediction for example in found.score.examples]
    assert 2 < sum(labels) < len(labels) - 2
    return lc.TextClassification(list(zip(texts, labels, strict=True)), tokenizer=tiny_tokenizer())


def _compress(model, steps, task, gates, **inputs):
    return lc.compress(model, steps, task=task, gates=gates, progress=False, **inputs)


def _score(right, *, metric="accuracy", scale="points", lower=False, predictions=True):
    kinds = {metric: MetricKind(scale=scale, lower_is_better=lower)}
    examples = [
        ExampleResult(values={metric: value}, label=1, prediction=int(value == 1) if predictions else None)
        for value in right
    ]
    mean = sum(right) / len(right)
    return TaskScore(
        task="toy", metrics={metric: mean}, kinds=kinds, primary=metric, examples=examples, protocol={"examples": 1}
    )


def test_drops_by_hand():
    task = lc.CustomTask(["a"], function=len, metric="accuracy")
    evidence = Evidence(task, _score([1] * 10), _score([1] * 8 + [0] * 2))
    seen = lc.MaxDrop("accuracy", 0.2).judge(evidence)
    assert (seen.passed, seen.value, seen.bound) == (True, 0.2, 0.2)
    assert seen.low < 0.2 < seen.high
    assert not lc.MaxDrop("accuracy", 0.19).judge(evidence).passed
    # The interval reaches further than what was seen: ten examples prove little.
    assert not lc.MaxDrop("accuracy", 0.2, proven=True).judge(evidence).passed
    assert lc.MaxDrop("accuracy", seen.high, proven=True).judge(evidence).passed
    better = lc.MaxDrop("accuracy", 0).judge(Evidence(task, evidence.stage, evidence.base))
    assert (better.passed, better.value) == (True, -0.2)
    agreed = lc.MinAgreement(0.8).judge(evidence)
    assert (agreed.passed, agreed.value) == (True, 0.8)
    assert not lc.MinAgreement(0.81).judge(evidence).passed
    assert Verdict.model_validate_json(seen.model_dump_json()) == seen
    errors = {"metric": "error", "scale": "difference", "lower": True, "predictions": False}
    worse = lc.MaxDrop("error", 0.1).judge(Evidence(task, _score([1.0, 3.0], **errors), _score([2.0, 4.0], **errors)))
    assert (worse.passed, worse.value) == (False, 1.0)


def test_equal_answers_to_few_examples_are_no_proof():
    errors = {"metric": "error {x}", "scale": "difference", "lower": True, "predictions": False}
    task = lc.CustomTask(["a"], function=len, metric="accuracy")
    same = lc.MaxDrop("error {x}", 0.1, proven=True).judge(Evidence(task, *[_score([1.0, 1.0, 1.0], **errors)] * 2))
    assert (same.passed, same.value) == (False, 0)
    assert "error {x} is worse by 0 (the sample tells no 95 % interval, use more examples), 0.1" in same.told
    some = lc.MaxDrop("error {x}", 0.1, proven=True).judge(Evidence(task, *[_score([1.0, 2.0, 3.0], **errors)] * 2))
    assert not some.passed
    assert some.low < -0.1 < 0 < 0.1 < some.high
    assert "-0 " not in some.told
    assert lc.MaxDrop("error {x}", 0.1).judge(Evidence(task, *[_score([1.0, 2.0, 3.0], **errors)] * 2)).passed


def test_perplexity_and_most_likely_tokens():
    llama = tiny_model("llama")
    texts = ["the cat sat on the mat and the dog sat on the rug"] * 4
    task = lc.LanguageModeling(texts, window=16, tokenizer=tiny_tokenizer())
    gates = [lc.MaxPerplexityRatio(1.2), lc.MinAgreement(0.999)]
    found = _compress(llama, lc.MagnitudePruning(sparsity=0.9), task, gates, on_fail="warn").report.steps[0]
    ratio = found.score.value / lc.evaluate(llama, task, latency=False, progress=False).score.value
    measured = lc.compare({"base": llama, "pruned": llama}, task, latency=False, progress=False)
    assert measured.candidates[0].change.fidelity[0].top1_agreement == 1
    perplexity, agreement = found.verdicts
    assert perplexity.value == pytest.approx(ratio)
    assert agreement.value == found.fidelity.top1_agreement < 0.999
    assert not agreement.passed
    assert "of the answers are the base's, 0.999 is needed" in agreement.told
    assert found.fidelity.answers == found.score.protocol["tokens_scored"]


def test_a_broken_stage_is_rolled_back(bert, task, tmp_path):
    before = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    gates = [lc.MaxDrop("accuracy", 0.2), AGREE]
    result = _compress(bert, STEPS, task, gates)
    good = lc.compress(bert, STEPS[0], progress=False).model.state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, good[name]), name
    report = result.report
    assert [record.step["name"] for record in report.steps] == ["magnitude_pruning"]
    assert report.rolled_back.step["name"] == "zero_classifier"
    assert [verdict.passed for verdict in report.rolled_back.verdicts] == [False, False]
    assert all(verdict.passed for verdict in report.steps[0].verdicts)
    assert report.not_run[0]["name"] == "dynamic_quantization"
    assert report.rolled_back.verdicts[0].value == pytest.approx(
        report.base_score.value - report.rolled_back.score.value
    )
    told = str(report)
    assert "zero_classifier (rolled back)" in told
    assert "MaxDrop(metric='accuracy', drop=0.2, proven=False)" in told
    assert "rolled back to magnitude_pruning; not run: dynamic_quantization" in told.replace("\n", " ")
    assert lc.Report.model_validate_json(report.model_dump_json()) == report
    metadata = json.loads((result.save_pretrained(tmp_path / "out") / "llmcompress.json").read_text())
    assert metadata["rolled_back"]["verdicts"][0]["gate"] == gates[0].to_dict() == metadata["gates"][0]
    assert all(torch.equal(tensor, before[name]) for name, tensor in bert.state_dict().items())


def test_nothing_is_left_of_a_first_stage_that_fails(bert, task, tmp_path):
    result = _compress(bert, STEPS[1:], task, AGREE)
    assert result.report.steps == []
    shown = lc.show(result.save_pretrained(tmp_path / "out"))
    assert yaml.safe_load(shown.recipe) == {"name": "pipeline", "steps": []}
    assert result.model is not bert
    assert "rolled back to the base, unchanged" in result.report.remarks()[0]
    assert all(torch.equal(one, bert.state_dict()[name]) for name, one in result.model.state_dict().items())


def test_a_comparison_tells_which_gate_failed_in_every_form(bert, task, tmp_path):
    results = {how: _compress(bert, STEPS, task, AGREE, on_fail=how) for how in ("rollback", "warn")}
    found = lc.compare({"base": bert, **results}, task, latency=False, progress=False)
    for text in (found.to_markdown(), found.to_html(), str(found)):
        told = " ".join(text.replace("\\", "").split())
        assert "rollback: zero_classifier: failed MinAgreement" in told
        assert "rolled back to magnitude_pruning; not run: dynamic_quantization" in told
        assert "warn: dynamic_quantization: failed MinAgreement" in told


def test_stop_and_warn(bert, task):
    with pytest.raises(
        lc.GateError, match=r"zero_classifier failed MinAgreement.* of the answers.*0\.9 is needed"
    ) as stop:
        _compress(bert, STEPS, task, {"name": "min_agreement", "share": 0.9}, on_fail="stop")
    assert [record.step["name"] for record in stop.value.report.steps] == ["magnitude_pruning", "zero_classifier"]
    report = _compress(bert, STEPS, task, AGREE, on_fail="warn").report
    assert [all(one.passed for one in record.verdicts) for record in report.steps] == [True, False, False]
    assert report.rolled_back is None
    assert report.remarks()[0].startswith("zero_classifier: failed MinAgreement")
    assert _compress(bert, STEPS[0], task, AGREE, inplace=True, on_fail="stop").model is bert


def test_the_tokenizer_comes_back_with_the_stage():
    llama, tokenizer = tiny_model("llama"), tiny_tokenizer()
    task = lc.LanguageModeling(["the cat sat on the mat"] * 4, window=16)
    steps = [lc.MagnitudePruning(sparsity=0.01), lc.VocabularyPruning()]
    inputs = {"tokenizer": tokenizer, "data": ["a", "the cat"]}
    found = _compress(llama, steps, task, [lc.MaxPerplexityRatio(1.1), lc.MinAgreement(0.5)], **inputs)
    # Most words of the task are unknown now, and the perplexity is lower: nothing is told by that, which is no pass.
    perplexity, agreement = found.report.rolled_back.verdicts
    assert (perplexity.passed, perplexity.value, agreement.value) == (False, None, None)
    assert "not asked the very same" in agreement.told
    assert found.tokenizer is tokenizer
    assert found.model.config.vocab_size == llama.config.vocab_size
    kept = _compress(
        llama, steps, task, lc.MaxPerplexityRatio(1.1), tokenizer=tokenizer, data=["the cat sat on the mat"]
    )
    assert kept.report.steps[1].verdicts[0].value < 1.1


@pytest.mark.parametrize(
    ("gates", "inputs", "message"),
    [
        (
            lc.MaxDrop("acuracy", 0.1),
            {},
            "MaxDrop.metric must be one of the task's, got 'acuracy'; did you mean 'accur",
        ),
        (lc.MaxPerplexityRatio(1.1), {}, "needs a task with a perplexity, such as LanguageModeling, got TextClassif"),
        (AGREE, {"task": None}, "MinAgreement needs a task to measure on"),
        (AGREE, {"on_fail": "undo"}, "on_fail must be one of 'rollback', 'stop', 'warn', got 'undo'"),
        (AGREE, {"inplace": True}, "on_fail='rollback' needs the model before each step"),
        (0.1, {}, "gates must be a list"),
        ({"name": "max_drop", "metric": "accuracy", "dropp": 0.1}, {}, "did you mean 'drop'"),
        ("max_dropp", {}, "did you mean 'max_drop'"),
    ],
)
def test_gates_that_cannot_be_told_are_refused_before_any_step(bert, task, monkeypatch, gates, inputs, message):
    monkeypatch.setattr(lc.MagnitudePruning, "compress", lambda *_: pytest.fail("a step ran"))
    with pytest.raises((lc.ConfigError, lc.UnknownNameError), match=message):
        lc.compress(bert, STEPS, **{"task": task, "gates": gates, "progress": False, **inputs})


def test_a_metric_that_a_task_never_has_is_refused_before_the_base_is_scored(bert, task, monkeypatch):
    monkeypatch.setattr(lc.TextClassification, "evaluate", lambda *_, **__: pytest.fail("the base was scored"))
    with pytest.raises(lc.ConfigError, match=r"MaxDrop.metric must be one of the task's, got 'perplexity'"):
        lc.compress(bert, STEPS, task=task, gates=lc.MaxDrop("perplexity", 0.1), progress=False)


def test_values_of_a_gate_are_checked():
    for wrong in (lambda: lc.MaxDrop("accuracy", -0.1), lambda: lc.MaxDrop("accuracy"), lambda: lc.MinAgreement(0)):
        with pytest.raises(lc.ConfigError, match=r"M\w+\.(drop|share) must be"):
            wrong()
    with pytest.raises(lc.ConfigError, match="each of its fields"):
        lc.MaxPerplexityRatio(1.1, False, 3)
    with pytest.raises(lc.ConfigError, match="each of its fields"):
        lc.MaxDrop("accuracy", metric="f1", drop=0.1)
