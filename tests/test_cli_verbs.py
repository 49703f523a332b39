"""The verbs that make and look at models: `compress`, `show`, `list`, `tasks`; each told as text and as JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import llmcompress as lc
from llmcompress.cli import app, main
from llmcompress.testing import tiny_model, tiny_tokenizer

FILMS = [("a good film", 1), ("a bad film", 0), ("so dull", 0), ("what a joy to see", 1)] * 3

RECIPES = {
    "recipe": "steps:\n- {name: magnitude_pruning, sparsity: 0.5}\n- {name: static_quantization, samples: 8}",
    "distil": "{name: knowledge_distillation, steps: 2}",
    "prune": "{name: magnitude_pruning}",
    "wide": "{name: magnitude_pruning, sparsity: 1.5}",
    "GPTQ": "{name: gptq, bits: 90}",
    "back": "steps: [{name: dynamic_quantization}, {name: magnitude_pruning}]",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("cli")
    tiny_model("bert").save_pretrained(place / "base")
    tiny_tokenizer().save_pretrained(place / "base")
    (place / "films.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in FILMS), encoding="utf-8")
    tiny_model("bert").save_pretrained(place / "bare")
    (place / "bare.txt").write_text("a film\nanother film\n")
    (place / "named.tsv").write_text("a good film\tLABEL_1\na bad film\tawful\n")
    (place / "empty.csv").write_text("text,label\n")
    for name, recipe in RECIPES.items():
        (place / f"{name}.yaml").write_text(recipe)
    return place


@pytest.fixture(scope="module")
def compressed(place: Path) -> Path:
    """The folder that `compress` writes, with what it wrote as JSON beside it."""
    films, recipe, out = str(place / "films.tsv"), str(place / "recipe.yaml"), place / "small"
    arguments = ["compress", str(place / "base"), "--recipe", recipe, "--data", films, "--out", str(out), "--seed", "3"]
    task = ["--task", "text_classification", "--task-data", films, "--set", "max_length=8"]
    told = ["--resume", str(place / "stages"), "--json", str(place / "report.json"), "--no-progress"]
    assert main([*arguments, *task, *told]) == 0
    return out


def test_compress_does_what_python_does(place: Path, compressed: Path) -> None:
    report = lc.Report.model_validate_json((place / "report.json").read_text(encoding="utf-8"))
    chain = lc.Pipeline.from_yaml(place / "recipe.yaml")
    task = lc.TextClassification(FILMS, max_length=8)
    ours = lc.compress(str(place / "base"), chain.steps, data=FILMS, task=task, seed=3, progress=False)
    assert report.recipe == ours.report.recipe
    assert report.seed == 3
    assert [record.score.metrics for record in report.steps] == [record.score.metrics for record in ours.report.steps]
    loaded = lc.load(compressed)
    for name, tensor in ours.model.state_dict().items():
        assert loaded.state_dict()[name].equal(tensor), name
    assert len(list((place / "stages").glob("0*"))) == 2


def test_json_on_standard_output_is_all_there_is(place: Path, compressed: Path) -> None:
    # A folder that an earlier run wrote is replaced.
    out = shutil.copytree(compressed, place / "again")
    arguments = ["compress", str(place / "base"), "--recipe", str(place / "prune.yaml"), "--out", str(out)]
    found = CliRunner().invoke(app, [*arguments, "--json", "-"])
    assert found.exit_code == 0, found.output
    assert [step["step"]["name"] for step in json.loads(found.stdout)["steps"]] == ["magnitude_pruning"]
    assert "static_quantization" not in (out / "llmcompress.json").read_text()


def test_a_failed_gate_gives_status_1_and_the_stage_before_it(place: Path, tmp_path: Path, capsys) -> None:
    films = str(place / "films.tsv")
    (tmp_path / "int8.yaml").write_text("name: dynamic_quantization")
    (tmp_path / "break.yaml").write_text("steps: [{name: magnitude_pruning, sparsity: 0.99}]")
    arguments = [
        "compress",
        str(place / "base"),
        "--recipe",
        str(tmp_path / "int8.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    task = ["--task", "text_classification", "--task-data", films, "--no-progress"]
    kept = ["--max-drop", "accuracy=1", "--min-agreement", "0.01"]
    assert main([*arguments, *task, *kept]) == 0
    shutil.rmtree(tmp_path / "out")
    wide = ["--recipe", str(tmp_path / "break.yaml"), "--min-agreement", "1"]
    assert main([*arguments, *task, *wide, "--on-fail", "stop"]) == 1
    assert "magnitude_pruning failed" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*arguments, *task, *wide]) == 1
    told = capsys.readouterr()
    assert "rolled back" in told.out
    assert "holds the stage before it" in told.err
    assert lc.show(tmp_path / "out").stored[0].scheme == "float32"
    assert main([*arguments, *task, "--max-drop", "accuracy"]) == 2
    assert main([*arguments, *task, "--max-drop", "acuracy=0.1"]) == 2
    assert "did you mean 'accuracy'" in capsys.readouterr().err


def test_plan_tells_what_compress_then_does(place: Path, compressed: Path, capsys) -> None:
    arguments = [
        "plan",
        str(place / "base"),
        "--recipe",
        str(place / "recipe.yaml"),
        "--data",
        str(place / "films.tsv"),
    ]
    assert main(arguments) == 0
    assert "static_quantization" in capsys.readouterr().out
    assert main([*arguments, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    report = lc.Report.model_validate_json((place / "report.json").read_text(encoding="utf-8"))
    assert [step["size"]["parameters"] for step in told["steps"]] == [
        record.footprint.parameters for record in report.steps
    ]
    assert main([*arguments[:4], "--data", "absent.txt"]) == 2


def test_show_tells_recipe_sizes_bits_and_scores(place: Path, compressed: Path, capsys) -> None:
    assert main(["show", str(compressed)]) == 0
    told = capsys.readouterr().out
    for part in ("BertForSequenceClassification", "blocks 2", "int8_static_linear", "sparsity: 0.5", "accuracy"):
        assert part in told
    assert main(["show", str(compressed), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["recipe"]["steps"][0]["sparsity"] == 0.5
    on_disk = (compressed / "model.safetensors").stat().st_size
    assert found["files"]["model.safetensors"] == on_disk
    header = int.from_bytes((compressed / "model.safetensors").read_bytes()[:8], "little") + 8
    assert sum(one["bytes"] for one in found["stored"]) == on_disk - header


def test_show_reads_a_folder_of_any_origin(place: Path, capsys) -> None:
    assert main(["show", str(place / "base")]) == 0
    told = capsys.readouterr().out
    assert "float32" in told
    assert "did not write this folder" in told


def test_list_names_every_strategy_and_its_fields(built_in_strategies, capsys) -> None:
    assert main(["list", "--json", "-"]) == 0
    found = {strategy["name"]: strategy for strategy in json.loads(capsys.readouterr().out)}
    assert set(built_in_strategies) <= set(found)
    for name, cls in built_in_strategies.items():
        assert [field["name"] for field in found[name]["fields"]] == list(cls.model_fields)
        assert all(field["description"] for field in found[name]["fields"])
        defaults = {field["name"]: field["default"] for field in found[name]["fields"]}
        assert {"name": name, **defaults} == {**dict.fromkeys(cls.model_fields), **cls().to_dict()}
    assert main(["list", "magnitude_pruning"]) == 0
    assert "sparsity = 0.5" in capsys.readouterr().out
    assert main(["list", "magnitude_prunning"]) == 2
    assert "did you mean 'magnitude_pruning'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipe": "absent.yaml"}, "there is no recipe"),
        ({"--out": "."}, "not a checkpoint of llmcompress"),
        ({"--task": "text_classification"}, "--task NAME and --task-data DATA together"),
        ({"--set": "max_length=8"}, "--set max_length=8 is a setting of a task; pass --task NAME"),
        ({"--on-fail": "warn"}, "--on-fail warn needs a gate"),
        ({"--max-drop": "accuracy=0.01"}, "pass --task NAME --task-data DATA"),
        ({"--json": "report.txt"}, "must end in .json"),
        ({"--data": "absent.tsv"}, "there is no file"),
        ({"MODEL": "absent"}, "absent"),
        ({"--seed": "-1"}, "--seed"),
    ],
)
def test_bad_input_is_told_before_any_work(place: Path, capsys, change: dict[str, str], message: str) -> None:
    given = {"MODEL": "base", "--recipe": "recipe.yaml", "--data": "films.tsv", "--out": "new", **change}
    files = {"MODEL", "--recipe", "--data", "--out", "--json"}
    places = {option: str(place / value) if option in files else value for option, value in given.items()}
    model = places.pop("MODEL")
    assert main(["compress", model, *(part for option in places.items() for part in option), "--no-progress"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (place / "new").exists()


def test_show_of_what_is_no_model_folder(place: Path, tmp_path: Path, capsys) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert main(["show", str(folder)]) == 2
    (tmp_path / "config.json").write_text("{")
    (tmp_path / "model.safetensors").write_bytes((place / "base" / "model.safetensors").read_bytes())
    assert main(["show", str(tmp_path)]) == 2
    assert "config.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["compress", "plan", "evaluate", "compare", "show", "list", "support"])
def test_help_has_an_example(verb: str) -> None:
    told = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "160", "TERM": "dumb"})
    assert told.exit_code == 0
    assert f"llmcompress {verb} " in told.output.replace("Usage: ", "").split("\n", 2)[-1]


@pytest.mark.parametrize("option", ["--resume", "--json"])
def test_nothing_may_be_inside_of_the_folder_that_is_written(option: str, place: Path, tmp_path: Path) -> None:
    arguments = [
        "compress",
        str(place / "base"),
        "--recipe",
        str(place / "recipe.yaml"),
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*arguments, option, str(tmp_path / "out" / "inside")]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("plan base --recipe recipe.yaml", "static_quantization needs data; pass --data DATA, for instance"),
        ("plan bare --recipe recipe.yaml --data films.tsv", "needs a tokenizer; pass --tokenizer NAME"),
        ("plan base --recipe recipe.yaml --data empty.csv", "--data is empty"),
        ("plan base --recipe distil.yaml --data bare.txt", "knowledge_distillation needs labels"),
        ("plan base --recipe distil.yaml --data bare.txt", "row 1 of --data has none"),
        ("plan base --recipe distil.yaml --data named.tsv", "label of row 2 of --data must be a class of Bert"),
        ("plan base --recipe wide.yaml", "(sparsity): magnitude_pruning.sparsity must be in (0, 1), got 1.5"),
        ("plan base --recipe GPTQ.yaml", "GPTQ.yaml, line 1 (bits): gptq.bits must be in"),
        ("plan base --recipe back.yaml", "magnitude_pruning cannot follow dynamic_quantization"),
        ("compress absent --recipe prune.yaml --out /dev/null/new", "/dev/null/new cannot be written"),
        ("compress base --recipe prune.yaml --out new TASK bare.txt", "row 1 of --task-data has no label"),
        ("compress base --recipe prune.yaml --out new TASK films.tsv --min-agreement 3", "--min-agreement must be in"),
        ("compress base --recipe prune.yaml --out new TASK films.tsv --max-drop f9=1", "--max-drop must be one of"),
        ("evaluate base --task text_classification --data bare.txt", "row 1 of --data has no label"),
        ("evaluate base --task text_classification --data films.tsv --set average=all", "--set average must be"),
        ("fit base --data films.tsv --out new TASK films.tsv", "pass --size '12 MB', --latency '3 ms' or --speedup 4."),
        ("fit base --data films.tsv --out new TASK films.tsv --size much", "--size must be a quantity such as '12 MB'"),
        ("sweep base prune.yaml --out new --on moon TASK films.tsv", "--on must be 'processes' or 'ray', got 'moon'"),
        ("show absent", "show must have a model folder, got 'absent'"),
        ("list MagnitudePruning", "no compressor is called 'MagnitudePruning'; did you mean 'magnitude_pruning'?"),
    ],
)
def test_an_error_speaks_of_what_can_be_typed(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, arguments: str, message: str
) -> None:
    monkeypatch.chdir(place)
    assert main(arguments.replace("TASK", "--no-progress --task text_classification --task-data").split()) == 2
    assert message in capsys.readouterr().err
    assert not Path("new").exists()
