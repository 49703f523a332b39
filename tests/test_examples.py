"""The examples run as they stand, and so does every Python block of README and documentation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import llmcompress as lc
from llmcompress.testing import tiny_model

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MOST_LINES = 39

LEAVES = {
    "classifier_to_int8.py": ["int8-classifier"],
    "compare_candidates.py": ["report.html"],
    "language_model_2_4.py": [],
    "prune_distill_int8.py": ["small-classifier", "stages"],
    "recipe_in_yaml.py": ["recipe.yaml"],
    "your_own_strategy.py": [],
}
PRINTS = {
    "classifier_to_int8.py": "logits equal",
    "compare_candidates.py": "100% of the predictions as before",
    "language_model_2_4.py": "bits a byte",
    "prune_distill_int8.py": "knowledge_distillation",
    "recipe_in_yaml.py": "equal: True",
    "your_own_strategy.py": "row_pruning",
}


@pytest.mark.slow
def test_examples_and_pages_run(tmp_path):
    # One test, not one a file: starting torch takes longer than most files, and workers share no fixture.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TMPDIR": str(tmp_path)}
    answer = tmp_path / "outcomes.json"
    files = (*EXAMPLES, *NOTEBOOKS, *PAGES)
    command = [sys.executable, str(ROOT / "tests" / "run_examples.py"), str(answer), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    outcomes = json.loads(answer.read_text())
    assert sorted(outcomes) == sorted(path.name for path in files)
    broken = {name: outcome["error"] for name, outcome in outcomes.items() if outcome["error"]}
    assert not broken, "\n".join(f"{name}:\n{error}" for name, error in broken.items())
    assert {path.name: outcomes[path.name]["left"] for path in EXAMPLES} == LEAVES
    assert [name for name, text in PRINTS.items() if text not in outcomes[name]["printed"]] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short_and_says_what_it_is(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert text.startswith('"""')


def test_every_example_is_named_in_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    files = [path.relative_to(ROOT).as_posix() for path in (*EXAMPLES, *NOTEBOOKS)]
    assert [file for file in files if file not in readme] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_holds_what_it_printed_in_earnest(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in ran] == list(range(1, len(ran) + 1))
    assert sum(bool(cell["outputs"]) for cell in ran) >= 3
    assert not [output for cell in ran for output in cell["outputs"] if output["output_type"] == "error"]


def test_the_file_format_page_names_every_key(tmp_path):
    result = lc.compress(tiny_model("bert"), lc.DynamicQuantization(), progress=False)
    folder = result.save_pretrained(tmp_path / "model")
    page = (ROOT / "docs" / "file-format.md").read_text(encoding="utf-8")
    written = json.loads((folder / "llmcompress.json").read_text())
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    record = written["steps"][0]
    actions = {key for action in (*record["touched"], *record["left"]) for key in action}
    keys = {*written, *record, *record["footprint"], *actions}
    assert sorted(key for key in keys if f"`{key}`" not in page) == []
    settings = {*quantization, *(key for group in quantization["groups"] for key in group)}
    assert sorted(key for key in settings if f'"{key}"' not in page) == []
    assert [group["scheme"] for group in quantization["groups"] if f"`{group['scheme']}`" not in page] == []


def test_the_strategies_page_and_the_readme_name_every_strategy(built_in_strategies):
    for page in ("README.md", "docs/strategies.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [name for name in built_in_strategies if f"`{name}`" not in text] == []
