"""Fidelity to the base: equal to a computation on full logits, streamed, absent where models are asked differently."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import llmcompress as lc
from llmcompress.evaluation.scoring import paired_tests, score_models
from llmcompress.testing import tiny_model

TEXTS = ["a quick brown fox jumps over the lazy dog", "and again, and again", "so it goes on for some more words"] * 4
ROWS = [(f"{text} {i}", i % 2) for i, text in enumerate(TEXTS)]


def scored(task, models, tokenizer, **settings):
    return score_models(task, models, dict.fromkeys(models, tokenizer), progress=False, **settings)


def shaken(model, strength: float = 0.2):
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += strength * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


def test_language_models_against_full_logits(tokenizer) -> None:
    base = tiny_model("llama")
    other = shaken(base)
    task = lc.LanguageModeling(TEXTS, window=24, stride=10, bos="never")
    found = scored(task, {"base": base, "other": other}, tokenizer).fidelity["other"]

    stream = tokenizer("\n\n".join(TEXTS), add_special_tokens=False)["input_ids"]
    logs: list[list[torch.Tensor]] = [[], []]
    done = 1  # the first token has nothing before it
    start = 0
    while done < len(stream):
        end = min(start + 24, len(stream))
        for number, model in enumerate((base, other)):
            with torch.no_grad():
                logits = model(torch.tensor([stream[start:end]])).logits[0]
            logs[number].append(logits.log_softmax(-1)[done - 1 - start : end - 1 - start])
        done, start = end, start + 10
    ours, theirs = torch.cat(logs[0]), torch.cat(logs[1])
    kl = (ours.exp() * (ours - theirs)).sum(-1)
    assert found.answers == len(stream) - 1
    assert found.kl_mean == pytest.approx(float(kl.mean()), rel=1e-4)
    assert found.kl_median == pytest.approx(float(kl.double().quantile(0.5)), rel=1e-4)
    assert found.kl_p99 == pytest.approx(float(kl.double().quantile(0.99)), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()))
    assert found.entropy_base == pytest.approx(float(-(ours.exp() * ours).sum(-1).mean()), rel=1e-4)
    assert found.entropy == pytest.approx(float(-(theirs.exp() * theirs).sum(-1).mean()), rel=1e-4)


def test_classifiers_against_full_logits(tokenizer) -> None:
    base = tiny_model("bert")
    other = shaken(base)
    found = scored(lc.TextClassification(ROWS), {"base": base, "other": other}, tokenizer, batch_size=5).fidelity[
        "other"
    ]
    kl, cosine = [], []
    for text, _ in ROWS:
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            outputs = [model.eval()(**inputs, output_hidden_states=True) for model in (base, other)]
        logs = [one.logits[0].log_softmax(-1) for one in outputs]
        kl.append(float(F.kl_div(logs[1], logs[0], log_target=True, reduction="sum")))
        texts = [one.hidden_states[-1].mean(1)[0] for one in outputs]
        cosine.append(float(F.cosine_similarity(texts[0], texts[1], dim=0)))
    assert found.answers == len(ROWS)
    assert found.kl_mean == pytest.approx(sum(kl) / len(kl), rel=1e-3, abs=1e-7)
    assert found.cosine == pytest.approx(sum(cosine) / len(cosine), abs=1e-5)


def test_side_by_side_is_as_alone(tokenizer) -> None:
    models = {"base": tiny_model("bert"), "other": tiny_model("bert", seed=1), "third": tiny_model("distilbert")}
    task = lc.TextClassification(ROWS)
    found = scored(task, models, tokenizer, batch_size=3)
    for name, model in models.items():
        alone = task.evaluate(model, tokenizer, batch_size=3, progress=False)
        assert found.scores[name] == alone


def test_models_that_read_other_tokens_are_scored_but_not_compared_by_answer(tokenizer) -> None:
    base = tiny_model("bert")
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["again"])
    bigger = copy.deepcopy(base)
    bigger.resize_token_embeddings(len(other), mean_resizing=False)
    found = score_models(
        lc.TextClassification(ROWS),
        {"base": base, "bigger": bigger},
        {"base": tokenizer, "bigger": other},
        progress=False,
    )
    assert set(found.scores) == {"base", "bigger"}
    assert found.fidelity == {}
    assert {test.metric for test in found.tests["bigger"]} == {"accuracy", "precision", "recall", "f1"}


def test_one_answer_to_everything_is_called_a_collapse(tokenizer) -> None:
    base = tiny_model("llama")
    broken = copy.deepcopy(base)
    with torch.no_grad():
        # Every position puts out one direction, which only token 5 answers to.
        broken.lm_head.weight = torch.nn.Parameter(torch.zeros_like(broken.lm_head.weight))
        broken.model.norm.weight.fill_(1.0)
        broken.lm_head.weight[5] = 50 * base.lm_head.weight[5]
    task = lc.LanguageModeling(TEXTS * 2, window=32)
    found = scored(task, {"base": base, "same": tiny_model("llama"), "broken": broken}, tokenizer).fidelity
    assert found["same"].collapse is None
    assert found["broken"].most_frequent > 0.5
    assert "collapse: one answer" in found["broken"].collapse


def test_holm_is_over_the_candidates(tokenizer) -> None:
    models = {"base": tiny_model("bert"), **{f"seed {i}": tiny_model("bert", seed=i) for i in range(1, 4)}}
    task = lc.TextClassification(ROWS * 3)
    found = scored(task, models, tokenizer)
    raw = {name: tests[0].p_value for name, tests in found.tests.items()}
    smallest = min(raw, key=raw.get)
    assert found.tests[smallest][0].metric == "accuracy"
    assert found.tests[smallest][0].p_holm == pytest.approx(min(1, 3 * raw[smallest]))
    assert all(test.p_holm >= test.p_value for tests in found.tests.values() for test in tests)


def test_scores_of_other_examples_are_not_paired(tokenizer) -> None:
    model = tiny_model("bert")
    task, fewer = lc.TextClassification(ROWS), lc.TextClassification(ROWS[:5])
    scores = [one.evaluate(model, tokenizer, progress=False) for one in (task, fewer)]
    assert paired_tests(task, *scores) == []


def test_a_quantized_model_keeps_the_answers(tokenizer) -> None:
    base = tiny_model("llama")
    small = lc.compress(base, lc.DynamicQuantization(), progress=False).model
    far = shaken(base, 1.0)
    task = lc.LanguageModeling(TEXTS, window=32)
    found = scored(task, {"base": base, "int8": small, "far": far}, tokenizer).fidelity
    assert 0 < found["int8"].kl_mean < found["far"].kl_mean / 10
    assert found["int8"].top1_agreement > found["far"].top1_agreement
    assert found["int8"].cosine > 0.99
