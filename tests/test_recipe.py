"""Recipe files: what is read, what is refused and where the fault is said to be; and the schema for editors."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import llmcompress as lc
from llmcompress.recipe import parse_recipe
from llmcompress.recipe.document import MOST_BYTES
from llmcompress.recipe.schema import json_schema

ROOT = Path(__file__).resolve().parent.parent
GALLERY = sorted((ROOT / "recipes").glob("*.yaml"))

REFUSED = {
    "": "line 1: the file must hold a recipe",
    "- gptq": "line 1: a recipe must be a mapping with the key 'steps'",
    "steps:\n- name: gptq\n  bitz: 4": "line 3 (steps[0].bitz): GPTQ has no field 'bitz'; did you mean 'bits'?",
    "steps:\n- gptq\n- gtpq": "line 3 (steps[1]): no compressor is called 'gtpq'; did you mean 'gptq'?",
    "steps:\n- gptq: {bits: 4}": "line 2 (steps[0]): a step must have the key 'name'; write `name: gptq`",
    "step:\n- gptq": "line 1 (step): a step must have the key 'name', got 'step'; did you mean 'steps'?",
    "steps:\n- nam: gptq": "line 2 (steps[0].nam): a step must have the key 'name', got 'nam'; did you mean 'name'?",
    "steps: [gptq]\nrecovery: null": "line 2 (recovery): a recipe has no key 'recovery'; did you mean 'recover'?",
    "steps: []": "line 1 (steps): steps must be a list of at least one step",
    "steps: [gptq]\nversion: 2": "line 2 (version): version must be at most 1, got 2",
    "version: one\nsteps: [gptq]": "line 1 (version): version must be 1, got 'one'",
    "steps:\n- name: gptq\n  bits: 4\n  bits: 3": "line 4: the key 'bits' stands here again, first in line 3",
    "steps:\n- name: magnitude_pruning\n  sparsity: 2": "line 3 (steps[0].sparsity): MagnitudePruning.",
    "steps:\n- name: knowledge_distillation\n  soft:\n    name: jsd\n    betta: 1": "line 5 (steps[0].soft.betta)",
    "steps:\n- name: knowledge_distillation\n  quantize_for:\n    name: weight_only_quantization\n    bits: 40": (
        "line 5 (steps[0].quantize_for.bits)"
    ),
    "steps:\n- steps:\n  - gptq\n  - name: awq\n    bits: x": "line 5 (steps[0].steps[1].bits)",
    "steps: [gptq]\nrecover:\n  name: knowledge_distillation\n  epochs: 0": "line 4 (recover.epochs)",
    "steps: [gptq]\nrecover: awq": "line 2 (recover): Pipeline.recover must be a KnowledgeDistillation",
    "description: two\nsteps:\n- gptq\n- magnitude_pruning": "line 4 (steps[1]): MagnitudePruning cannot follow GPTQ",
    "steps:\n- 5: x": "line 2: a key must be a name, got 5; quote it",
    "steps: &a\n- *a": "line 2: *a must not stand inside of its own &a",
    "steps: [*b]": "line 1: *b must stand behind its &b",
    "steps:\n- !!python/object:os.system {}": "line 2: a recipe must have no tags",
    "steps:\n- {<<: {name: gptq}}": "line 2: a recipe must have no merge keys",
    "steps: [gptq]\n---\nsteps: []": "line 2: a file must hold one recipe",
    "steps: [": "line 1: no valid YAML",
    "steps:\n\t- gptq": "line 2: no valid YAML: found character '\\t'",
    'steps:\n- "\\U00110000"': "line 2: no valid YAML",
    "steps: \x00": "line 1: the character U+0000 is not allowed",
    "a:\n" + "[" * 60: "line 2: values must be nested at most",
    "a: &a [1,1,1,1,1,1,1,1,1,1]\n"
    + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcd", "bcde", strict=True)
    ): "line 5: a recipe must have at most",
}


@pytest.mark.parametrize(("text", "message"), REFUSED.items(), ids=[repr(text)[1:24] for text in REFUSED])
def test_a_fault_is_told_with_its_line_and_key(text: str, message: str) -> None:
    with pytest.raises(lc.CompressionError, match=re.escape(f"recipe.yaml, {message}")):
        parse_recipe(text.encode(), "recipe.yaml")


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "big.yaml").write_text("#" * (MOST_BYTES + 1))
    with pytest.raises(lc.ConfigError, match="at most 256 KiB"):
        lc.Pipeline.from_yaml(tmp_path / "big.yaml")
    with pytest.raises(lc.ConfigError, match="cannot be read"):
        lc.Pipeline.from_yaml(tmp_path)
    with pytest.raises(lc.ConfigError, match="line 2: a recipe must be UTF-8, got the byte 0xff"):
        parse_recipe(b"steps:\n- \xff", "recipe.yaml")


def test_values_mean_what_they_look_like() -> None:
    """What YAML 1.1 reads as 124, as a text and as False."""
    prune = "steps:\n- {name: magnitude_pruning, pattern: 2:4, skip: [no]}\n"
    text = f"{prune}recover:\n  name: knowledge_distillation\n  learning_rate: 1e-4"
    chain = parse_recipe(text.encode(), "recipe.yaml")
    assert chain.steps[0] == lc.MagnitudePruning(pattern="2:4", skip=("no",))
    assert chain.recover == lc.KnowledgeDistillation(learning_rate=1e-4)


def test_anchors_say_a_thing_once(tmp_path: Path) -> None:
    text = "version: 1\nsteps:\n- &distil {name: knowledge_distillation, epochs: 1}\n- depth_pruning\n- *distil\n"
    (tmp_path / "recipe.yaml").write_text(f"# for whom\n{text}description: >\n  Twice\n  the same.\n")
    distil = lc.KnowledgeDistillation(epochs=1)
    assert lc.Pipeline.from_yaml(tmp_path / "recipe.yaml").steps == (distil, lc.DepthPruning(), distil)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.text(min_size=1, max_size=8).filter(str.strip) | st.sampled_from(["1e5", "0o7", "2:4", "no", "~"])),
    st.floats(1e-12, 1e3),
)
def test_what_is_written_is_read_back(tmp_path_factory, skip: list[str], rate: float) -> None:
    file = tmp_path_factory.getbasetemp() / "again.yaml"
    chain = lc.Pipeline(
        steps=[lc.MagnitudePruning(skip=skip), lc.Pipeline(steps=["gptq"])],
        recover=lc.KnowledgeDistillation(learning_rate=rate),
    )
    chain.to_yaml(file, description="# 1e5: what it is for\n\n- nothing")
    assert file.read_text(encoding="utf-8").startswith("version: 1\ndescription: ")
    assert lc.Pipeline.from_yaml(file) == chain


def test_old_words_are_read_as_todays() -> None:
    old = "steps:\n- name: knowledge_distillation\n  hidden: 0.5\n  features: {attention: 1}"
    with pytest.warns(FutureWarning, match=r"line 3 \(steps\[0\].hidden\): .* `features: {hidden: ...}` now"):
        step = parse_recipe(old.encode(), "old.yaml").steps[0]
    assert step == lc.KnowledgeDistillation(features={"hidden": 0.5, "attention": 1})
    with pytest.warns(FutureWarning):
        off = parse_recipe(b"steps: [{name: knowledge_distillation, hidden: 0.0}]", "old.yaml").steps[0]
    assert off == lc.KnowledgeDistillation()
    with pytest.raises(lc.ConfigError, match=r"old.yaml, line 3 \(steps\[0\].hidden\): .* once"):
        parse_recipe(old.replace("attention", "hidden").encode(), "old.yaml")


def test_mutated_files_are_read_or_refused_with_their_line() -> None:
    spec = importlib.util.spec_from_file_location("fuzz_recipes", ROOT / "benchmarks" / "fuzz_recipes.py")
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    outcomes, _ = fuzz.run(100)  # the script runs 5,000
    assert outcomes.total() >= 100
    assert outcomes["ConfigError"] > 0
    assert outcomes["read"] > 0


# --- the schema ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> jsonschema.Draft202012Validator:
    schema = json.loads((ROOT / "docs" / "recipe.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_the_published_schema_is_that_of_the_strategies(published, built_in_strategies) -> None:
    made = json.loads(json.dumps(json_schema(built_in_strategies)))
    assert published.schema == made, "docs/recipe.schema.json is out of date; write it anew with: make schema"


def test_the_schema_takes_what_is_written_and_refuses_what_is_refused(published, built_in_strategies, tmp_path) -> None:
    for name, cls in built_in_strategies.items():
        if name != "pipeline":
            lc.Pipeline(steps=[cls()]).to_yaml(tmp_path / "recipe.yaml", description=name)
            published.validate(yaml.safe_load((tmp_path / "recipe.yaml").read_text()))
            assert not published.is_valid({"steps": [{"name": name, "no_such_field": 1}]}), name
    for wrong in (
        {"steps": []},
        {"steps": ["gtpq"]},
        {"steps": ["gptq"], "version": 2},
        {"steps": ["gptq"], "step": 1},
    ):
        assert not published.is_valid(wrong), wrong
    assert not published.is_valid({"steps": [{"name": "magnitude_pruning", "sparsity": 2}]})
