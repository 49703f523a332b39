"""Tasks: hand-computed metrics, scores that do not depend on padding or order, and clear refusals."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import llmcompress as lc
from llmcompress.errors import CompressionError, ConfigError, MissingInputError, UnsupportedModelError
from llmcompress.evaluation.statistics import flips, median_interval, wilson
from llmcompress.evaluation.tasks import LanguageModeling, TextClassification
from llmcompress.evaluation.tasks.language_modeling import cut_windows
from llmcompress.evaluation.tasks.measures import classification
from llmcompress.testing import tiny_model

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
TEXT = "a quick brown fox jumps over the lazy dog, again and again. " * 12


def rows(count: int = 30) -> list[tuple[str, int]]:
    return [(TEXT[i : i + 1 + (7 * i) % 80], i % 2) for i in range(count)]


def measured(*data, **settings):
    """Metrics of classes given for classes, every example counted once."""
    return {
        name: float(value[0]) for name, value in classification(*data, **settings)(np.ones((1, len(data[0])))).items()
    }


def score(model, task, tokenizer, **settings):
    found = task.evaluate(model, tokenizer, progress=False, **settings)
    assert set(found.metrics) <= set(task.metric_names)  # by which wrong names are refused before any work
    return found


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_macro_metrics_by_hand() -> None:
    # class 0: 1 of 2 predictions right, 1 of 1 found; class 1: 1/1, 1/2; class 2: 1/2, 1/2; class 3: never predicted
    found = measured([0, 1, 1, 2, 2, 3], [0, 1, 0, 2, 2, 2])
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["precision"] == pytest.approx((1 / 2 + 1 + 2 / 3 + 0) / 4)
    assert found["recall"] == pytest.approx((1 + 1 / 2 + 1 + 0) / 4)
    assert found["f1"] == pytest.approx((2 / 3 + 2 / 3 + 4 / 5 + 0) / 4)


def test_binary_metrics_by_hand() -> None:
    found = measured([1, 1, 1, 0, 0], [1, 0, 0, 1, 0], average="binary")
    assert found == pytest.approx({"accuracy": 2 / 5, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5})


def test_wilson_and_mcnemar_against_the_closed_forms() -> None:
    n, p, z = 50, 0.8, 1.959963984540054
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    assert wilson(40, 50) == pytest.approx((middle - half, middle + half))
    found = flips([True] * 8 + [False] * 2, [False] * 6 + [True] * 4, [False] * 10)
    assert (found.right_to_wrong, found.wrong_to_right) == (6, 2)
    assert found.p_value == pytest.approx(2 * sum(math.comb(8, k) for k in range(3)) / 2**8)


def test_median_interval_holds_the_median_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 25, generator=generator)
    held = sum(low <= 0 <= high for low, high in (median_interval(draw.tolist()) for draw in draws)) / len(draws)
    assert 0.94 <= held <= 0.985  # order statistics are discrete: at least 95 %, not much more


# --- classification --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta"])
def test_padding_batching_and_sorting_change_no_score(family: str, tokenizer) -> None:
    model, task = tiny_model(family), TextClassification(rows())
    alone = score(model, task, tokenizer, batch_size=1)
    together = score(model, task, tokenizer, batch_size=7)
    assert [one.prediction for one in together.examples] == [one.prediction for one in alone.examples]
    ours, theirs = ([one.confidence for one in found.examples] for found in (together, alone))
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert together.metrics == alone.metrics


def test_results_come_in_the_order_of_the_data(tokenizer) -> None:
    model, data = tiny_model("bert"), rows()
    found = score(model, TextClassification(data), tokenizer)
    assert [one.label for one in found.examples] == [label for _, label in data]
    for (text, _), one in zip(data, found.examples, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert one.confidence == pytest.approx(float(expected.max()), abs=1e-5)
        assert one.prediction == int(expected.argmax())


def test_pairs_reach_the_model(tokenizer) -> None:
    task = TextClassification([{"sentence1": "a cat", "sentence2": second, "label": 0} for second in ("a dog", "rain")])
    one, other = score(tiny_model("bert"), task, tokenizer).examples
    assert one.confidence != other.confidence


def test_names_of_classes_are_read_from_the_config(tokenizer) -> None:
    model = tiny_model("bert")
    model.config.label2id = {"bad": 0, "good": 1}
    model.config.id2label = {0: "bad", 1: "good"}
    found = score(model, TextClassification([("x", "good"), ("y", "bad"), ("z", 1)]), tokenizer)
    assert [one.label for one in found.examples] == [1, 0, 1]
    assert found.classes == ("bad", "good")
    with pytest.raises(ConfigError, match=r"data\[0\] has the label 'goood'.*did you mean 'good'"):
        score(model, TextClassification([("x", "goood")]), tokenizer)


@pytest.mark.parametrize("label", [2, -1, 0.5, 7, math.nan, math.inf])
def test_labels_out_of_range_are_named(label, tokenizer) -> None:
    with pytest.raises(ConfigError, match=rf"data\[1\] must have a label in \[0, 2\), got {label}"):
        score(tiny_model("bert"), TextClassification([("x", 0), ("y", label)]), tokenizer)


def test_bad_data_and_settings_are_refused_on_construction(tmp_path) -> None:
    with pytest.raises(MissingInputError, match="empty"):
        TextClassification([])
    with pytest.raises(MissingInputError, match=r"data\[1\] has no label"):
        TextClassification([("x", 1), "y"])
    with pytest.raises(MissingInputError, match="no file"):
        TextClassification(tmp_path / "absent.csv")
    with pytest.raises(ConfigError, match=r"max_length must be an integer in \[1, inf\), got 0"):
        TextClassification([("x", 1)], max_length=0)
    with pytest.raises(ConfigError, match="average must be"):
        TextClassification([("x", 1)], average="micro")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_model_without_a_classifier_is_refused(family: str, tokenizer) -> None:
    with pytest.raises(UnsupportedModelError, match="needs a model with a classification head"):
        score(tiny_model(family), TextClassification([("x", 0)]), tokenizer)


def test_nan_names_the_first_bad_example(tokenizer) -> None:
    model = tiny_model("bert")
    bad = tokenizer("~")["input_ids"][0]
    with torch.no_grad():
        model.get_input_embeddings().weight[bad] = math.nan
    data = [("fine", 0)] * 5 + [("a ~", 1), ("longer than the others", 0), ("~ again, and long", 1)]
    with pytest.raises(CompressionError, match=r"NaN or infinity for example 7"):  # longest first, one batch each
        score(model, TextClassification(data), tokenizer, batch_size=1)
    with pytest.raises(CompressionError, match=r"NaN or infinity for example 5"):
        score(model, TextClassification(data), tokenizer)


def test_long_texts_are_cut_and_counted(tokenizer) -> None:
    task = TextClassification([(TEXT, 0), ("short", 1), (TEXT[:16], 1)], max_length=16)
    found = score(tiny_model("bert"), task, tokenizer)
    assert found.protocol["truncated"] == 1  # exactly as long as the limit is not cut
    assert found.warnings[0] == "1 of 3 texts were cut to 16 tokens"
    with pytest.raises(ConfigError, match="max_length must be at most 512"):
        score(tiny_model("bert"), TextClassification([("x", 0)], max_length=4000), tokenizer)


@pytest.mark.parametrize("pair", [None, "mat"])
def test_a_limit_that_leaves_no_room_for_text_is_refused(pair: str | None, tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import BertConfig, BertForMaskedLM

    marks = [("<s>", 2), ("</s>", 3)]
    template = TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=marks)
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.mask_token = "<extra_0>"
    sizes = {"vocab_size": 128, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(**sizes, intermediate_size=8))
    special, data = 2 + (pair is not None), [("hello there", pair, 0)]
    for task, model in ((TextClassification, tiny_model("bert")), (lc.MaskedLanguageModeling, masked)):
        with pytest.raises(ConfigError, match=rf"{task.__name__}.max_length must be above {special}, .* got {special}"):
            score(model, task(data, max_length=special), tokenizer)
        assert score(model, task(data, max_length=special + 1), tokenizer).protocol["truncated"] == 1


def test_a_tokenizer_of_another_model_is_refused(tokenizer) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    small = BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    with pytest.raises(ConfigError, match="vocabulary has 40"):
        score(BertForSequenceClassification(small), TextClassification([("zebra", 0)]), tokenizer)


@pytest.mark.parametrize("pad", [None, 0])
def test_a_classifier_on_a_decoder_needs_no_padding_token(pad: int | None, tokenizer) -> None:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, pad_token_id=pad)).eval()
    tokenizer.pad_token = None
    data = rows(6)
    found = score(model, TextClassification(data), tokenizer)
    for (text, _), one in zip(data, found.examples, strict=True):
        with torch.inference_mode():
            expected = model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0]
        assert one.confidence == pytest.approx(float(expected.max()), abs=1e-5)
    assert found.protocol["batch_size"] == (1 if pad is None else 32)


def test_the_model_is_left_as_it_was(tokenizer) -> None:
    model = tiny_model("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    score(model, TextClassification(rows(4)), tokenizer)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_one_class_only_is_told_as_collapse(tokenizer) -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.bias[1] = 100.0
    assert any("collapse" in text for text in score(model, TextClassification(rows(6)), tokenizer).warnings)


# --- language modelling ----------------------------------------------------------------------------------------------


@torch.inference_mode()
def independent_nll(model, ids: list[int], window: int, stride: int, bos: int | None = None) -> tuple[float, int]:
    """The textbook loop: labels of what was scored before, and of the first token, are masked."""
    total, count, scored = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        x = torch.tensor([([] if bos is None else [bos]) + ids[begin:end]])
        losses = torch.nn.functional.cross_entropy(model(input_ids=x).logits[0, :-1], x[0, 1:], reduction="none")
        new = min(end - max(scored, begin), len(losses))
        total, count, scored = total + float(losses[len(losses) - new :].sum()), count + new, end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize(("window", "stride"), [(32, None), (32, 16), (50, 7), (512, None)])
def test_nll_equals_an_independent_loop(family: str, window: int, stride: int | None, tokenizer) -> None:
    model, text = tiny_model(family), TEXT[:300]
    found = score(model, LanguageModeling([text], window=window, stride=stride), tokenizer, batch_size=3)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = independent_nll(model, ids, window, stride or window)
    assert found.protocol["tokens_scored"] == count == sum(one.weight for one in found.examples)
    assert found.metrics["nll"] == pytest.approx(total / count, rel=1e-5)
    assert found.metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found.metrics["bits_per_byte"] == pytest.approx(total / count / math.log(2) * len(ids) / 300, rel=1e-5)


def test_bos_gives_the_first_token_of_every_window_a_context(tokenizer) -> None:
    model, text = tiny_model("llama"), TEXT[:100]
    found = score(model, LanguageModeling([text], window=21, bos="always"), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = independent_nll(model, ids, 20, 20, bos=tokenizer.bos_token_id)
    assert found.protocol["tokens_scored"] == count == 100
    assert found.metrics["nll"] == pytest.approx(total / count, rel=1e-5)
    assert score(model, LanguageModeling([text], window=21), tokenizer).protocol["bos"] == "none"


@pytest.mark.parametrize(("window", "length"), [(2, 40), (5, 9), (21, 41)])
def test_behind_bos_every_token_is_scored_in_its_window(window: int, length: int, tokenizer) -> None:
    model, text = tiny_model("llama"), TEXT[:length]
    found = score(model, LanguageModeling([text], window=window, bos="always"), tokenizer)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    total, count = independent_nll(model, ids, window - 1, window - 1, bos=tokenizer.bos_token_id)
    assert found.protocol["tokens_scored"] == count == len(ids)
    assert found.protocol["windows"] == -(-len(ids) // (window - 1))
    assert found.metrics["nll"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("task", [lc.LanguageModeling, lc.MultipleChoice])
@pytest.mark.parametrize("family", ["bert", "xlm", "xlnet"])
def test_a_model_that_reads_ahead_is_no_causal_one(task, family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {
        "xlm": {"emb_dim": 8, "n_layers": 1, "n_heads": 2},
        "xlnet": {"d_model": 8, "n_layer": 1, "n_head": 2},
    }.get(family, sizes)
    asked = task(["a text"] if task is lc.LanguageModeling else [("q", ["a", "b"], 0)])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, vocab_size=128, **sizes))
    with pytest.raises(UnsupportedModelError, match="an encoder that also reads what stands behind a token"):
        asked.check(model)
    if family == "bert":
        told = AutoConfig.for_model(family, vocab_size=128, is_decoder=True, **sizes)
        asked.check(AutoModelForCausalLM.from_config(told))


@pytest.mark.parametrize(
    ("task", "settings", "message"),
    [
        (lc.LanguageModeling, {"window": None}, r"window must be an integer in \[2, inf\), got None"),
        (lc.LanguageModeling, {"join": None}, "join must be a text, got None"),
        (lc.MultipleChoice, {"delimiter": None}, "delimiter must be a text, got None"),
        (lc.QuestionAnswering, {"stride": None}, "stride must be an integer"),
        (lc.QuestionAnswering, {"max_answer_tokens": None}, "max_answer_tokens must be an integer"),
        (lc.TextGeneration, {"max_new_tokens": None}, "max_new_tokens must be an integer"),
        (lc.TextGeneration, {"num_beams": None}, "num_beams must be an integer"),
        (lc.TextGeneration, {"stop": None}, "stop must be strings"),
        (lc.TextGeneration, {"template": "{prompt"}, "template must name a column"),
        (lc.TextGeneration, {"template": None}, "template must name a column"),
        (lc.CustomTask, {"function": len, "head": "AutoModelForFoo"}, "head must be a class of transformers"),
        (lc.CustomTask, {"function": len, "lower_is_better": None}, "lower_is_better must be True, False or a list"),
    ],
)
def test_settings_of_another_type_are_refused_on_construction(task, settings, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"{task.__name__}.{message}"):
        task([("a b", "c")], **settings)


def test_windows_by_hand() -> None:
    cut = [(window.start, window.end, window.new) for window in cut_windows(11, 4, 4)]
    assert cut == [(0, 4, 0), (4, 8, 4), (8, 11, 8)]
    assert [(window.start, window.new) for window in cut_windows(9, 4, 2)] == [(0, 0), (2, 4), (4, 6), (6, 8)]


def test_max_windows_and_batch_size_do_not_change_a_window(tokenizer) -> None:
    model = tiny_model("llama")
    every = score(model, LanguageModeling([TEXT], window=32), tokenizer, batch_size=1).examples
    first = score(model, LanguageModeling([TEXT], window=32, max_windows=5), tokenizer, batch_size=4).examples
    assert [one.values["nll"] for one in first] == pytest.approx([one.values["nll"] for one in every[:5]], rel=1e-5)


def test_language_modeling_refuses_what_it_cannot_do(tokenizer) -> None:
    model = tiny_model("llama")
    with pytest.raises(MissingInputError, match="at least two tokens"):
        score(model, LanguageModeling(["a"]), tokenizer)
    with pytest.raises(ConfigError, match="stride must be at most the window"):
        LanguageModeling(["abc"], window=8, stride=9)
    with pytest.raises(ConfigError, match=r"window must be an integer in \[2, inf\)"):
        LanguageModeling(["abc"], window=1)
    with pytest.raises(ConfigError, match="window must be at most 1024"):
        score(tiny_model("gpt2"), LanguageModeling(["abc"], window=1025), tokenizer)
    for family in ("bert", "t5"):
        with pytest.raises(UnsupportedModelError, match="needs a causal language model"):
            score(tiny_model(family), LanguageModeling(["abc"]), tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(ConfigError, match="needs a tokenizer with a BOS token"):
        score(model, LanguageModeling(["abc"], bos="always"), tokenizer)


def test_language_modeling_names_the_window_with_nan(tokenizer) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer("~")["input_ids"][0]] = math.nan
    # The embedding is also the head: a NaN in one row of the vocabulary is one in every window.
    with pytest.raises(CompressionError, match=r"window 0 \(tokens 0 to 16 of the text\)"):
        score(model, LanguageModeling([TEXT], window=16), tokenizer)


# --- registry and evaluate() -----------------------------------------------------------------------------------------


def test_tasks_are_found_by_name_and_built_from_dicts() -> None:
    assert {"text_classification", "language_modeling"} <= set(lc.tasks.list())
    task = lc.tasks.create({"name": "language_modeling", "data": ["some text"], "window": 16})
    assert isinstance(task, LanguageModeling)
    assert task.window == 16
    assert task.name == "language_modeling"


def test_the_hash_tells_data_apart() -> None:
    one = TextClassification([("a", 1), ("b", 0)]).data_hash
    assert one == TextClassification([{"text": "a", "label": 1}, {"text": "b", "label": 0}]).data_hash
    assert one != TextClassification([("a", 1), ("b", 1)]).data_hash


def test_evaluate_finds_the_tokenizer_or_says_what_is_missing(tmp_path, tokenizer) -> None:
    task = TextClassification(rows(4))
    with pytest.raises(MissingInputError, match="TextClassification needs a tokenizer"):
        lc.evaluate(tiny_model("bert"), task, latency=False, progress=False)
    tiny_model("bert").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    found = lc.evaluate(tmp_path, task, latency=False, progress=False)
    assert found.size.from_files
    assert found.size.disk_bytes == (tmp_path / "model.safetensors").stat().st_size
    assert (
        lc.evaluate(
            tiny_model("bert"), TextClassification(rows(4), tokenizer=tokenizer), latency=False, progress=False
        ).scores
        == found.scores
    )


def test_evaluation_survives_json_and_prints(tokenizer) -> None:
    tasks = [TextClassification(rows(8)), TextClassification(rows(4))]
    found = lc.evaluate(tiny_model("bert"), tasks, tokenizer=tokenizer, latency=[(1, 8)], progress=False)
    assert lc.Evaluation.model_validate_json(found.to_json()) == found
    assert found.to_dict()["scores"][0]["metrics"]["accuracy"] == found.score.value
    for text in (str(found), found.to_markdown(), found._repr_html_()):
        assert "accuracy" in text
        assert "latency 1x8" in text


def test_evaluate_refuses_what_is_no_task_and_no_model(tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer must be a tokenizer of transformers, got 'folder'; pass Auto"):
        lc.evaluate(tiny_model("bert"), TextClassification(rows(2)), tokenizer="folder")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"batch_size must be an integer in \[1, inf\), got None"):
        TextClassification(rows(2)).evaluate(tiny_model("bert"), tokenizer, batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="task must be a Task"):
        lc.evaluate(tiny_model("bert"), "accuracy", tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(MissingInputError, match="task is empty"):
        lc.evaluate(tiny_model("bert"), [], tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="model must be a transformers model"):
        lc.evaluate(object(), TextClassification(rows(2)), tokenizer=tokenizer)  # type: ignore[arg-type]
    with pytest.raises(lc.CheckpointError, match="cannot load"):
        lc.evaluate(tmp_path / "absent", TextClassification(rows(2)), tokenizer=tokenizer)
    with pytest.raises(ConfigError, match=r"latency must be True, False, or \(rows, tokens\) pairs"):
        lc.evaluate(tiny_model("bert"), TextClassification(rows(2)), tokenizer=tokenizer, latency=[(1,)])  # type: ignore[list-item]


@pytest.mark.assets
@pytest.mark.skipif(not ASSETS.is_dir(), reason=f"no folder {ASSETS}")
def test_the_shared_protocol_on_a_trained_llama() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = ASSETS / "babyllama-tok105-hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    text = next((ASSETS / "tinystories").glob("*.txt")).read_text().replace("\n\n", "\n")[:100_000]
    task = LanguageModeling([text], window=256, max_windows=60, bos="never")
    found = lc.evaluate(model, task, latency=False, progress=False).score
    assert found.metrics["nll"] == pytest.approx(0.7318, abs=5e-4)
    assert found.protocol["tokens_scored"] == 60 * 255
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][: 60 * 256]
    total, count = independent_nll(model, ids, 256, 256)
    assert found.metrics["nll"] == pytest.approx(total / count, rel=1e-5)
