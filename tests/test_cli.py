"""The command line: what it prints and writes, its exit status, and that bad input is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import llmcompress as lc
from llmcompress.claims import Condition
from llmcompress.cli import main
from llmcompress.cli.options import make_task
from llmcompress.testing import tiny_model


@pytest.fixture
def place(tmp_path: Path, tokenizer) -> Path:
    for name, seed in (("base", 0), ("other", 1)):
        tiny_model("bert", seed=seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [("a good film", 1), ("a bad film", 0), ("so dull", 0), ("what a joy to see", 1)] * 3
    (tmp_path / "test.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in rows), encoding="utf-8")
    return tmp_path


def on_films(place: Path) -> list[str]:
    return ["--task", "text_classification", "--data", str(place / "test.tsv"), "--no-latency"]


def test_evaluate_prints_a_table_and_writes_json(place: Path, capsys) -> None:
    out = place / "new" / "found.json"
    assert main(["evaluate", str(place / "base"), *on_films(place), "--set", "max_length=8", "--json", str(out)]) == 0
    assert "accuracy" in capsys.readouterr().out
    found = lc.Evaluation.model_validate_json(out.read_text(encoding="utf-8"))
    assert found.score.protocol["max_length"] == 8
    assert len(found.score.examples) == 12


def test_compare_names_models_and_writes_every_rendering(place: Path, capsys) -> None:
    files = [place / name for name in ("report.html", "report.md", "report.json", "report.csv")]
    options = [
        part
        for option, file in zip(("--html", "--markdown", "--json", "--csv"), files, strict=True)
        for part in (option, str(file))
    ]
    models = [str(place / "base"), f"mine={place / 'other'}"]
    assert main(["compare", *models, *on_films(place), *options]) == 0
    assert "mine" in capsys.readouterr().out
    assert [entry["name"] for entry in json.loads(files[2].read_text(encoding="utf-8"))["entries"]] == ["base", "mine"]
    assert "mine" in files[0].read_text(encoding="utf-8")
    assert "mine" in files[1].read_text(encoding="utf-8")


def test_a_condition_that_holds_gives_status_1_and_the_number(place: Path, capsys) -> None:
    models = [str(place / "base"), f"same={place / 'base'}", f"mine={place / 'other'}"]
    assert main(["compare", *models, *on_films(place), "--fail-if", "accuracy_drop>2", "--fail-if", "smaller<0.5"]) == 0
    capsys.readouterr()
    assert main(["compare", *models, *on_films(place), "--fail-if", "agreement<=1"]) == 1
    error = capsys.readouterr().err
    assert "same: agreement <= 1 holds, it is 1" in error
    assert "mine: agreement <= 1" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "text_clasification", "--data", "x.csv"], "did you mean 'text_classification'"),
        (["--task", "text_classification", "--data", "missing.csv"], "there is no file"),
        (["--task", "text_classification", "--data", "DATA", "--set", "max_lenght=3"], "did you mean 'max_length'"),
        (["--task", "text_classification", "--data", "DATA", "--set", "max_length=-3"], "max_length must be"),
        (["--task", "text_classification", "--data", "DATA", "--html", "report.pdf"], "must end in .html"),
        (["--task", "text_classification", "--data", "DATA", "--csv", "/dev/null/a.csv"], "a.csv cannot be written"),
        (["--task", "text_classification", "--data", "DATA", "--fail-if", "accuracy drop"], "NAME SIGN NUMBER"),
        (["--task", "text_classification", "--data", "DATA", "--tokenizer", "nowhere/at/all"], "cannot be loaded"),
        (["--task", "text_classification", "--data", "nofile"], "no file and no hub data set 'nofile'"),
        (["--task", "custom", "--data", "DATA"], "which only Python can pass"),
        (["--task", "text_classification", "--data", "DATA", "--set", "max_length=["], "must be a YAML value, got '['"),
    ],
)
def test_bad_input_is_one_line_and_status_2(place: Path, capsys, arguments: list[str], message: str) -> None:
    arguments = [str(place / "test.tsv") if part == "DATA" else part for part in arguments]
    assert main(["compare", str(place / "base"), str(place / "other"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_place_that_cannot_be_written_is_refused_before_any_model_is_read(place: Path, tmp_path, capsys) -> None:
    (tmp_path / "folder.json").mkdir()
    for json_file in ("/dev/null/deep/x.json", str(tmp_path / "folder.json")):
        for verb in (["evaluate", "absent"], ["compare", "absent", "none"]):
            assert main([*verb, *on_films(place), "--json", json_file]) == 2
            error = capsys.readouterr().err
            assert "cannot be written" in error
            assert "choose another place" in error
    assert main(["evaluate", "absent", *on_films(place), "--json", str(tmp_path / "new" / "x.json")]) == 2
    assert "absent" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()  # looking leaves nothing behind


def test_only_tasks_that_the_command_line_can_build_are_named(capsys) -> None:
    assert main(["evaluate", "absent", "--task", "costum", "--data", "x.csv"]) == 2
    known = capsys.readouterr().err.partition("must be one of: ")[2]
    assert "text_classification" in known
    assert "custom" not in known


def test_settings_are_texts_where_the_task_declares_text_and_else_what_a_recipe_reads(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").write_text(json.dumps({"text": "a", "prompt": "a", "reference": "b"}))
    data = str(tmp_path / "asked.jsonl")
    asked = make_task("language_modeling", data, "test", ["join=no", "window=0x10", "max_windows=~", "bos=never"])
    assert (asked.join, asked.window, asked.max_windows, asked.bos) == ("no", 16, None, "never")
    settings = ["template=Q: {text}", "reference=reference", "measures=[exact_match]", "stemmer=false"]
    written = make_task("text_generation", data, "test", settings)
    assert (written.template, list(written.measures), written.stemmer) == ("Q: {text}", ["exact_match"], False)
    with pytest.raises(lc.ConfigError, match=r"window must be an integer .* got '2:4'"):
        make_task("language_modeling", data, "test", ["window=2:4"])
    with pytest.raises(lc.ConfigError, match="stemmer must be True or False, got 'no'"):
        make_task("text_generation", data, "test", ["stemmer=no"])


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("acuracy_drop>0.1", "did you mean 'accuracy_drop'"),
        ("perplexity_ratio>1", "There may be: accuracy, accuracy_drop"),
        ("speedup<1", "--no-latency leaves out"),
    ],
)
def test_a_condition_on_what_is_not_measured_is_refused_before_any_model_is_read(
    place: Path, capsys, condition: str, message: str
) -> None:
    # These models do not exist: who reads them first says so.
    assert main(["compare", "absent/one", "absent/two", *on_films(place), "--fail-if", condition]) == 2
    assert message in capsys.readouterr().err


def test_a_head_without_saved_weights_is_not_scored(place: Path, tokenizer, capsys) -> None:
    tiny_model("gpt2").save_pretrained(place / "writer")
    tokenizer.save_pretrained(place / "writer")
    for arguments in (["evaluate", str(place / "writer")], ["compare", str(place / "base"), str(place / "writer")]):
        assert main([*arguments, *on_films(place)]) == 2
        error = capsys.readouterr().err
        assert "was saved as GPT2LMHeadModel and has no weights for score.weight" in error
        assert "GPT2ForSequenceClassification needs" in error


def test_two_models_of_one_name_are_refused(place: Path, capsys) -> None:
    assert main(["compare", str(place / "base"), str(place / "base"), *on_films(place)]) == 2
    assert "NAME=" in capsys.readouterr().err


def test_a_wrong_option_and_a_missing_folder(place: Path, capsys) -> None:
    assert main(["compare", str(place / "base"), "--taks", "x"]) == 2
    assert main(["evaluate", str(place / "nowhere"), *on_films(place)]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_tasks_lists_every_task_of_the_registry(capsys) -> None:
    assert main(["tasks"]) == 0
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line[0] != " "} == set(
        lc.tasks.list()
    )


def test_version(capsys) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == f"llmcompress {lc.__version__}"


# --- claims ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared() -> lc.Comparison:
    from llmcompress.testing import tiny_tokenizer

    base = tiny_model("bert")
    rows = [(f"text number {i} is {'good' if i % 3 else 'bad'}", i % 2) for i in range(40)]
    small = lc.compress(base, lc.DynamicQuantization(), progress=False).model
    models = {"base": base, "same": tiny_model("bert"), "int8": small}
    task = lc.TextClassification(rows)
    return lc.compare(models, task, tokenizer=tiny_tokenizer(), latency=[(1, 8)], progress=False)


def test_non_inferiority_is_proven_by_the_interval(compared: lc.Comparison) -> None:
    test = compared.test("same", "accuracy")
    assert test.change == 0
    compared.assert_non_inferior("accuracy", margin=-test.low + 1e-9, candidate="same")
    # 40 equal answers cannot prove a loss below half a point: the message says what they could see.
    with pytest.raises(lc.ClaimError, match=r"same: accuracy must not be worse by more than 0.005.*sample of 40"):
        compared.assert_non_inferior("accuracy", margin=0.005, candidate="same")
    with pytest.raises(AssertionError):
        compared.assert_non_inferior("accuracy", margin=1e-6)


def test_claims_of_size_and_speed(compared: lc.Comparison) -> None:
    compared.assert_smaller(0.99)
    with pytest.raises(lc.ClaimError, match="same: must be at least 4x smaller"):
        compared.assert_smaller(4)
    compared.assert_speedup(compared["int8"].change.faster[0].low, candidate="int8")
    with pytest.raises(lc.ClaimError, match=r"at least 1000x as fast .* at 1x8 tokens, got .*interval"):
        compared.assert_speedup(1000, shape=(1, 8))
    with pytest.raises(lc.ConfigError, match=r"\(1, 8\)"):
        compared.assert_speedup(1, shape=(2, 8))


def test_claims_about_what_is_not_there(compared: lc.Comparison) -> None:
    with pytest.raises(lc.ConfigError, match="did you mean 'accuracy'"):
        compared.assert_non_inferior("acuracy", margin=0.1)
    with pytest.raises(lc.ConfigError, match="is the base"):
        compared.assert_smaller(1, candidate="base")
    with pytest.raises(lc.ConfigError, match="margin must be a number above 0"):
        compared.assert_non_inferior("accuracy", margin=0)
    with pytest.raises(lc.ConfigError, match="did you mean 'accuracy_drop'"):
        Condition.parse("acuracy_drop>0.1").holds(compared, compared["same"])


@pytest.mark.parametrize("factor", ["2", -1, 0, float("nan"), float("inf"), True, None])
def test_a_bound_that_is_no_number_above_0_proves_nothing(compared: lc.Comparison, factor: object) -> None:
    with pytest.raises(lc.ConfigError, match="factor must be a number above 0, got"):
        compared.assert_smaller(factor)
    with pytest.raises(lc.ConfigError, match="factor must be a number above 0, got"):
        compared.assert_speedup(factor)
    with pytest.raises(lc.ConfigError, match="margin must be a number above 0, got"):
        compared.assert_non_inferior("accuracy", margin=factor)


def test_a_shape_may_be_a_list(compared: lc.Comparison) -> None:
    compared.assert_speedup(1e-6, shape=[1, 8])
    for shape in ([2, 8], [1, [8]], 8):
        with pytest.raises(lc.ConfigError, match="shape must be one at which latency was measured"):
            compared.assert_speedup(1e-6, shape=shape)


def test_equal_answers_to_few_examples_prove_nothing(tokenizer) -> None:
    base = tiny_model("bert")
    texts = [f"text number {i}" for i in range(5)]
    first = lc.evaluate(base, lc.TextClassification([(text, 0) for text in texts]), tokenizer=tokenizer, latency=False)
    for right in (5, 4):
        given = [example.prediction for example in first.score.examples]
        labels = [one if index < right else 1 - one for index, one in enumerate(given)]
        task = lc.TextClassification(list(zip(texts, labels, strict=True)))
        found = lc.compare({"a": base, "b": base}, task, tokenizer=tokenizer, latency=False, progress=False)
        for metric in ("accuracy", "precision", "recall", "f1"):
            test = found.test("b", metric)
            assert (test.change, test.detectable) == (0, None)
            assert test.high is None or test.high > 0.3
            with pytest.raises(lc.ClaimError, match=rf"b: {metric} must not be worse .* sample of 5 .* use more"):
                found.assert_non_inferior(metric, margin=0.001)
        assert all(low < high for low, high in found.base.evaluation.score.intervals.values())


def test_what_is_no_number_passes_no_condition(tokenizer) -> None:
    from transformers import BertForSequenceClassification

    config = tiny_model("bert").config
    config.num_labels = 1
    torch.manual_seed(0)
    base, dead = BertForSequenceClassification(config), BertForSequenceClassification(config)
    with torch.no_grad():
        dead.classifier.weight.zero_()
    task = lc.TextClassification([(f"text number {i} " * (1 + i % 4), i % 5 / 4) for i in range(12)])
    found = lc.compare({"base": base, "dead": dead}, task, tokenizer=tokenizer, latency=False, progress=False)
    entry = found["dead"]
    for condition in ("pearson_drop>0.01", "pearson<0.5", "pearson>0.5"):
        assert Condition.parse(condition).holds(found, entry)
    told = Condition.parse("pearson<0.5").told(found, entry)
    assert told == "dead: pearson < 0.5 cannot be ruled out, it is no number (nan)"
    for page in (str(found), found.to_markdown(), found.to_html()):
        assert "cannot be compared" in page
        assert "nan is within chance" not in page
        assert "nan within chance" not in page
    with pytest.raises(lc.ClaimError, match="cannot be compared by it"):
        found.assert_non_inferior("pearson", margin=0.1)
    evaluation = lc.evaluate(dead, task, tokenizer=tokenizer, latency=False, progress=False)
    assert lc.Evaluation.model_validate_json(evaluation.to_json()).to_json() == evaluation.to_json()


def test_conditions_know_which_way_is_worse(compared: lc.Comparison) -> None:
    entry = compared["int8"]
    ours, theirs = compared.base.evaluation.score, entry.evaluation.score
    assert Condition.parse("accuracy_drop>0").value(compared, entry) == pytest.approx(ours.value - theirs.value)
    assert Condition.parse("smaller < 4").value(compared, entry) == entry.change.smaller_on_disk


def test_a_higher_perplexity_is_a_loss(tokenizer) -> None:
    texts = ["the cat sat on the mat and looked at the dog for a while"] * 12
    base = tiny_model("llama")
    worse = tiny_model("llama")
    with torch.no_grad():
        worse.get_output_embeddings().weight.mul_(40)  # as wrong as before, and sure of it
    models = {"base": base, "worse": worse}
    found = lc.compare(
        models, lc.LanguageModeling(texts, window=16), tokenizer=tokenizer, latency=False, progress=False
    )
    test = found.test("worse", "perplexity")
    ratio = found["worse"].evaluation.score.value / found.base.evaluation.score.value
    assert test.scale == "ratio"
    assert test.change == pytest.approx(ratio)
    assert test.low > 1
    assert Condition.parse("perplexity_ratio>1").value(found, found["worse"]) == pytest.approx(ratio)
    found.assert_non_inferior("perplexity", margin=test.high - 1 + 1e-6)
    with pytest.raises(lc.ClaimError, match="perplexity must not be worse"):
        found.assert_non_inferior("perplexity", margin=(test.high - 1) / 2)
