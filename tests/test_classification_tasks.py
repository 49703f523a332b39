"""Kinds of classification beside one class a text, and metrics that are no means: against brute force and scipy."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from scipy import stats

from llmcompress.errors import CompressionError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation.scoring import score_models
from llmcompress.evaluation.tasks import TextClassification, measures
from llmcompress.testing import tiny_model


def score(model, task, tokenizer, **settings):
    found = task.evaluate(model, tokenizer, progress=False, **settings)
    assert set(found.metrics) <= set(task.metric_names)  # by which wrong names are refused before any work
    return found


def classifier(labels: int, problem: str | None = None, *, seed: int = 0):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    sizes = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, intermediate_size=64, initializer_range=0.2, num_labels=labels, problem_type=problem)
    config.id2label = {index: f"class {index}" for index in range(labels)}
    config.label2id = {name: index for index, name in config.id2label.items()}
    return BertForSequenceClassification(config).eval()


@torch.inference_mode()
def logits(model, tokenizer, *texts: str) -> torch.Tensor:
    return model(**tokenizer(*texts, return_tensors="pt")).logits[0]


def texts(count: int) -> list[str]:
    return [f"sentence {i} of some words {'and more ' * (i % 3)}" for i in range(count)]


# --- sets of classes -------------------------------------------------------------------------------------------------


def test_sets_of_classes_by_index_by_name_and_by_zeros_and_ones(tokenizer) -> None:
    model = classifier(3, "multi_label_classification")
    data = [("a b", [0, 2]), ("c d", ["class 2", "class 0"]), ("g", []), ("i", ["class 1"])]
    flags = [("a b", [1, 0, 1]), ("c d", [1, 0, 1]), ("g", (0, 0, 0)), ("i", np.array([0, 1, 0]))]
    found = score(model, TextClassification(data), tokenizer)
    assert [one.label for one in found.examples] == [(0, 2), (0, 2), (), (1,)]
    assert score(model, TextClassification(flags), tokenizer).examples == found.examples
    for (text, _), one in zip(data, found.examples, strict=True):
        chosen = (logits(model, tokenizer, text).sigmoid() > 0.5).nonzero().flatten().tolist()
        assert one.prediction == tuple(chosen)
        assert one.values["subset_accuracy"] == float(one.prediction == one.label)
    assert found.primary == "f1_micro"
    assert found.protocol["problem"] == "multi_label_classification"


def test_all_sets_of_classes_are_read_in_one_form(tokenizer) -> None:
    # [0, 1] of two classes could be the second one or both: the other rows tell, as they do in training.
    def read(*labels) -> list[tuple[int, ...]]:
        data = [("a", label) for label in labels]
        found = score(classifier(2, "multi_label_classification"), TextClassification(data), tokenizer)
        return [one.label for one in found.examples]

    assert read([0, 1], [1, 0]) == [(1,), (0,)]
    assert read([0, 1], [0], [1]) == [(0, 1), (0,), (1,)]
    with pytest.raises(ConfigError, match=r"data\[1\].label must be a list of classes as that of data\[0\], \(1,\)"):
        read([1], [1, 1])


def test_a_regression_of_several_numbers_is_refused(tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match=r"needs a regression of one number, got .* with 3"):
        score(classifier(3, "regression"), TextClassification([("a", 0.5)]), tokenizer)


def test_the_names_of_a_data_sets_classes_are_the_models(tokenizer) -> None:
    from datasets import ClassLabel, Dataset, Features, Value

    def labels(names, **settings):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        data = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]}, features=features)
        found = score(classifier(3), TextClassification(data), tokenizer)
        return [one.label for one in found.examples], [one for one in found.warnings if "index" in one]

    assert labels(["Class 2", "Class 0", "Class 1"]) == ([2, 0, 1], [])
    assert labels(["bad", "fair", "good"]) == (
        [0, 1, 2],
        [
            "the data calls its classes bad, fair, good and the model class 0, class 1, class 2: labels were read by "
            "their index"
        ],
    )


@pytest.mark.parametrize("family", ["bert", "gpt2", "xlnet"])
def test_the_side_that_a_tokenizer_pads_on_changes_no_score(family: str, tokenizer) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    sizes = {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 64} if family == "xlnet" else sizes
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4} if family == "gpt2" else sizes
    config = AutoConfig.for_model(family, vocab_size=128, initializer_range=0.2, pad_token_id=0, num_labels=3, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    task = TextClassification([("ab" * n, n % 3) for n in range(1, 13)])
    alone = [one.confidence for one in score(model, task, tokenizer, batch_size=1).examples]
    for side in ("left", "right"):
        tokenizer.padding_side = side
        together = [one.confidence for one in score(model, task, tokenizer, batch_size=12).examples]
        assert together == pytest.approx(alone, abs=1e-5)


@pytest.mark.parametrize(
    ("problem", "labels", "label", "message"),
    [
        ("multi_label_classification", 3, 1, r"data\[1\] must have a list of classes as label .* got 1"),
        ("multi_label_classification", 3, "class 1", r"data\[1\] must have a list of classes"),
        ("multi_label_classification", 3, [3], r"data\[1\] must have a label in \[0, 3\), got 3"),
        ("multi_label_classification", 3, ["clas 1"], r"data\[1\] has the label 'clas 1'.*did you mean 'class 1'"),
        ("single_label_classification", 3, [0, 1], r"data\[1\] must have a label in \[0, 3\), got \(0, 1\)"),
        ("single_label_classification", 3, -1, "-1 marks the unlabelled test splits"),
        ("regression", 1, "high", r"data\[1\] must have a number as label .* got 'high'"),
        ("regression", 1, math.nan, r"data\[1\] must have a number as label .* got nan"),
        ("regression", 1, True, r"data\[1\] must have a number as label .* got True"),
    ],
)
def test_labels_that_do_not_fit_are_named(problem: str, labels: int, label, message: str, tokenizer) -> None:
    fine = {"multi_label_classification": [0], "single_label_classification": 0, "regression": 0.5}[problem]
    with pytest.raises(ConfigError, match=message):
        score(classifier(labels, problem), TextClassification([("x", fine), ("y", label)]), tokenizer)


# --- pairs and regression --------------------------------------------------------------------------------------------


def test_both_sentences_of_a_pair_are_read(tokenizer) -> None:
    model, rows = classifier(2), [{"sentence1": "a cat", "sentence2": f"a dog {i}", "label": i % 2} for i in range(5)]
    found = score(model, TextClassification(rows), tokenizer, batch_size=2)
    for row, one in zip(rows, found.examples, strict=True):
        assert one.confidence == pytest.approx(
            float(logits(model, tokenizer, row["sentence1"], row["sentence2"]).softmax(-1).max()), abs=1e-5
        )
    assert TextClassification(rows).shown(1) == "a cat | a dog 1"


def test_a_regression_has_scipys_correlations(tokenizer) -> None:
    model = classifier(1)
    targets = [round(0.5 * (i * 7 % 11), 1) for i in range(24)]
    found = score(model, TextClassification(list(zip(texts(24), targets, strict=True))), tokenizer)
    given = [one.prediction for one in found.examples]
    assert given == pytest.approx([float(logits(model, tokenizer, text)[0]) for text in texts(24)], abs=1e-4)
    assert found.metrics["pearson"] == pytest.approx(stats.pearsonr(targets, given).statistic)
    assert found.metrics["spearman"] == pytest.approx(stats.spearmanr(targets, given).statistic)
    assert found.metrics["rmse"] == pytest.approx(math.sqrt(np.mean((np.array(targets) - given) ** 2)))
    assert found.primary == "pearson"
    assert found.classes is None
    low, high = found.intervals["pearson"]
    assert -1 <= low < found.metrics["pearson"] < high <= 1


def test_one_number_for_all_has_no_correlation_and_is_told(tokenizer) -> None:
    model = classifier(1)
    with torch.no_grad():
        model.classifier.weight.zero_()
    found = score(model, TextClassification([("a", 1.0), ("b", 2.0), ("c", 4.0)]), tokenizer)
    assert math.isnan(found.metrics["pearson"])
    assert "pearson" not in found.intervals
    assert "collapse: every example was given the number 0" in found.warnings


# --- metrics against brute force on repeated examples -----------------------------------------------------------------


def drawn(seed: int, examples: int, resamples: int = 40) -> np.ndarray:
    """Counts of bootstrap samples, all examples once, and each alone with a second."""
    random = np.random.default_rng(seed)
    counts = random.multinomial(examples, [1 / examples] * examples, size=resamples)
    pairs = np.eye(examples, dtype=int)[:5] + np.eye(examples, dtype=int)[5:10]
    return np.concatenate([np.ones((1, examples), int), counts, pairs])


def prf(both: int, predicted: int, present: int) -> tuple[float, float, float]:
    precision = both / predicted if predicted else 0.0
    recall = both / present if present else 0.0
    return precision, recall, 2 * both / (predicted + present) if predicted + present else 0.0


@pytest.mark.parametrize("average", ["macro", "binary"])
@pytest.mark.parametrize("seed", range(3))
def test_classification_on_counts_is_classification_of_repeated_examples(average: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    classes = 2 if average == "binary" else 5
    labels, given = random.integers(0, classes, 30), random.integers(0, classes, 30)
    counts = drawn(seed, 30)
    found = measures.classification(labels, given, average=average)(counts.astype(float))
    for number, row in enumerate(counts):
        y, p = np.repeat(labels, row), np.repeat(given, row)
        occurring = [1] if average == "binary" else sorted(set(y) | set(p))
        each = [prf(int(((y == c) & (p == c)).sum()), int((p == c).sum()), int((y == c).sum())) for c in occurring]
        expected = dict(zip(("precision", "recall", "f1"), np.mean(each, axis=0), strict=True))
        assert {name: value[number] for name, value in found.items()} == pytest.approx(
            {"accuracy": np.mean(y == p), **expected}
        )


@pytest.mark.parametrize("seed", range(3))
def test_sets_on_counts_are_sets_of_repeated_examples(seed: int) -> None:
    random = np.random.default_rng(seed)
    real, given = random.random((30, 4)) < 0.3, random.random((30, 4)) < 0.3
    sets = [[tuple(np.flatnonzero(row)) for row in table] for table in (real, given)]
    counts = drawn(seed, 30)
    found = measures.multi_label(*sets, classes=4)(counts.astype(float))
    for number, row in enumerate(counts):
        y, p = np.repeat(real, row, axis=0), np.repeat(given, row, axis=0)
        precision, recall, micro = prf(int((y & p).sum()), int(p.sum()), int(y.sum()))
        each = [
            prf(int((y & p)[:, c].sum()), int(p[:, c].sum()), int(y[:, c].sum()))[2]
            for c in range(4)
            if y[:, c].any() or p[:, c].any()
        ]
        assert {name: value[number] for name, value in found.items()} == pytest.approx(
            {
                "f1_micro": micro,
                "f1_macro": np.mean(each) if each else 0.0,
                "precision": precision,
                "recall": recall,
                "subset_accuracy": np.mean((y == p).all(1)),
            },
            nan_ok=True,
        )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_correlations_on_counts_are_scipys_of_repeated_examples(ties: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(0, 5, 30).astype(float) if ties else random.normal(size=30)
    y = np.round(x + random.normal(size=30)) if ties else x + random.normal(size=30)
    counts = drawn(seed, 30)[:-5]  # two examples have a correlation of one, or none
    found = measures.regression(x, y)(counts.astype(float))
    for number, row in enumerate(counts):
        a, b = np.repeat(x, row), np.repeat(y, row)
        assert found["pearson"][number] == pytest.approx(stats.pearsonr(a, b).statistic)
        assert found["spearman"][number] == pytest.approx(stats.spearmanr(a, b).statistic)
        assert found["rmse"][number] == pytest.approx(np.sqrt(np.mean((a - b) ** 2)))


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_correlation_has_no_unit(unit: float) -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=100)
    y = x + random.normal(size=100) / 10
    counts = np.ones((1, 100))
    expected = stats.pearsonr(x, y).statistic
    assert measures.regression(x * unit, y * unit)(counts)["pearson"][0] == pytest.approx(expected)
    for constant in (np.zeros(100), np.full(100, 0.1 * unit)):
        assert math.isnan(measures.regression(x * unit, constant)(counts)["pearson"][0])


def test_spans_on_counts_by_hand() -> None:
    found = measures.spans([1, 0, 2], [2, 1, 2], [1, 1, 4])(np.array([[1.0, 1, 1], [2, 0, 1], [0, 1, 0]]))
    assert found["precision"] == pytest.approx([3 / 5, 4 / 6, 0])
    assert found["recall"] == pytest.approx([3 / 6, 4 / 6, 0])
    assert found["f1"] == pytest.approx([6 / 11, 8 / 12, 0])


def test_classification_equals_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = np.random.default_rng(0)
    labels, given = random.integers(0, 4, 200), random.integers(0, 6, 200)
    found = {name: value[0] for name, value in measures.classification(labels, given)(np.ones((1, 200))).items()}
    expected = metrics.precision_recall_fscore_support(labels, given, average="macro", zero_division=0)
    assert [found[name] for name in ("precision", "recall", "f1")] == pytest.approx(list(expected[:3]))
    real, chosen = random.random((200, 5)) < 0.3, random.random((200, 5)) < 0.3
    sets = [[tuple(np.flatnonzero(row)) for row in table] for table in (real, chosen)]
    found = {name: value[0] for name, value in measures.multi_label(*sets, classes=5)(np.ones((1, 200))).items()}
    assert found["f1_micro"] == pytest.approx(metrics.f1_score(real, chosen, average="micro"))
    assert found["f1_macro"] == pytest.approx(metrics.f1_score(real, chosen, average="macro"))
    assert found["subset_accuracy"] == pytest.approx(metrics.accuracy_score(real, chosen))


# --- fidelity, NaN, padding ------------------------------------------------------------------------------------------


def changed(model, factor: float):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.classifier.weight.mul_(factor)
    return other


def test_fidelity_of_sets_takes_each_class_as_a_yes_or_no(tokenizer) -> None:
    base = classifier(3, "multi_label_classification")
    models = {"base": base, "other": changed(base, 0.7)}
    data = [(text, [0]) for text in texts(7)]
    found = score_models(TextClassification(data), models, dict.fromkeys(models, tokenizer), progress=False)
    divergences, agree = [], []
    for text, _ in data:
        p, q = (logits(model, tokenizer, text).double().sigmoid() for model in models.values())
        divergences += (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).tolist()
        agree += ((p > 0.5) == (q > 0.5)).tolist()
    fidelity = found.fidelity["other"]
    assert fidelity.answers == 21
    assert fidelity.kl_mean == pytest.approx(np.mean(divergences), rel=1e-3)
    assert fidelity.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-3)
    assert fidelity.top1_agreement == pytest.approx(np.mean(agree))


def test_fidelity_of_a_regression_is_in_its_embeddings(tokenizer) -> None:
    base = classifier(1)
    models = {"base": base, "other": changed(base, 2.0)}
    data = list(zip(texts(6), range(6), strict=True))
    fidelity = score_models(TextClassification(data), models, dict.fromkeys(models, tokenizer), progress=False).fidelity
    assert fidelity["other"].kl_mean is None
    assert fidelity["other"].answers == 6
    assert fidelity["other"].cosine == pytest.approx(1.0)  # only the head is another


@pytest.mark.parametrize(
    ("labels", "problem", "label"), [(3, "multi_label_classification", [1]), (1, "regression", 0.5)]
)
def test_nan_is_named_with_its_example(labels: int, problem: str, label, tokenizer) -> None:
    model = classifier(labels, problem)
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("~")] = math.nan
    data = [("fine", label), ("fine too, and long", label), ("not ~", label)]
    with pytest.raises(CompressionError, match="NaN or infinity for example 2 of the data"):
        score(model, TextClassification(data), tokenizer)


def test_a_decoder_without_a_padding_token_goes_one_by_one(tokenizer) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    tokenizer.pad_token = None
    for problem, labels, label in (("multi_label_classification", 3, [1]), ("regression", 1, 0.5)):
        config = GPT2Config(**sizes, pad_token_id=None, num_labels=labels, problem_type=problem)
        model = GPT2ForSequenceClassification(config).eval()
        found = score(model, TextClassification([(text, label) for text in texts(4)]), tokenizer)
        assert found.protocol["batch_size"] == 1
        for text, one in zip(texts(4), found.examples, strict=True):
            expected = logits(model, tokenizer, text)
            given = one.prediction if labels == 1 else None
            assert given is None or given == pytest.approx(float(expected[0]), abs=1e-5)
            assert labels == 1 or one.prediction == tuple((expected > 0).nonzero().flatten().tolist())


def test_no_label_is_told_before_work_starts() -> None:
    with pytest.raises(MissingInputError, match=r"data\[1\] has no label"):
        TextClassification([{"text": "a", "label": [0]}, {"text": "b"}])


def test_families_without_a_special_head_are_scored(tokenizer) -> None:
    found = score(tiny_model("distilbert"), TextClassification([("a", 0), ("b", 1)]), tokenizer)
    assert found.metrics["accuracy"] in (0, 0.5, 1)
