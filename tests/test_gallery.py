"""The gallery of recipes: each is read, is what the schema allows, and runs on a tiny model; its page has them all."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
GALLERY = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    text = (ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8")
    return jsonschema.Draft202012Validator(json.loads(text))


@pytest.mark.parametrize("path", GALLERY, ids=lambda path: path.stem)
def test_a_recipe_of_the_gallery_is_read_and_runs(path: Path, schema: jsonschema.Draft202012Validator) -> None:
    text = path.read_text(encoding="utf-8")
    first, whom, *_ = text.splitlines()
    assert first == "# yaml-language-server: $schema=../docs/recipe.schema.json"
    assert whom.startswith("# ")
    schema.validate(yaml.safe_load(text))

    chain = lc.Pipeline.from_yaml(path)
    trained = any(isinstance(step, lc.KnowledgeDistillation) for step in chain.flatten())
    if trained:
        return  # for minutes: the benchmark does
    model = tiny_model(path.stem.partition("-")[0])
    steps = [_shortened(step) for step in chain.steps]
    found = lc.compress(model, steps, data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
    assert found.report.steps[-1].footprint.disk_bytes < found.report.base.disk_bytes


def _shortened(step: lc.Compressor) -> lc.Compressor:
    """The same step for a tiny vocabulary."""
    return step.model_copy(update={"keep": 40}) if isinstance(step, lc.VocabularyPruning) else step


def test_there_are_ten_and_the_page_has_them() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert len(GALLERY) == 10
    for path in GALLERY:
        assert f"| [{path.stem}](#{path.stem}) |" in page
        assert f'--8<-- "recipes/{path.name}"' in page
