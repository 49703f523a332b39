import sys
from importlib.metadata import EntryPoint

import pytest

import llmcompress as lc
from llmcompress.registry import Registry


def _class(name, module="somewhere"):
    return type(name, (), {"__module__": module})


def test_lists_gets_and_creates():
    registry = Registry("shape")
    cls = registry.register("circle")(
        type("Circle", (), {"__init__": lambda self, radius=1: setattr(self, "r", radius)})
    )
    assert registry.list() == ["circle"] == list(registry)
    assert registry.get("circle") is cls
    assert registry.create({"name": "circle", "radius": 3}).r == 3
    assert registry.create("circle").r == 1
    assert registry.name_of(cls) == "circle"
    assert "circle" in registry
    assert "square" not in registry


def test_suggests_the_nearest_name():
    with pytest.raises(lc.UnknownNameError, match="did you mean 'magnitude_pruning'"):
        lc.compressors.get("magnitude_prunning")
    with pytest.raises(LookupError):
        lc.compressors.create({"name": "zebra"})


def test_refuses_another_class_of_the_same_name_but_not_the_same_class_again():
    registry = Registry("shape")
    registry.register("circle")(_class("Circle"))
    again = registry.register("circle")(_class("Circle"))  # as a notebook cell that runs twice makes it
    assert registry.get("circle") is again
    with pytest.raises(lc.DuplicateNameError, match=r"'circle' is already somewhere\.Circle"):
        registry.register("circle")(_class("Round"))


@pytest.mark.parametrize("name", ["Circle", "my-shape", "", "1st", None])
def test_refuses_names_that_are_not_snake_case(name):
    with pytest.raises(lc.ConfigError, match="snake_case"):
        Registry("shape").register(name)


@pytest.mark.parametrize("spec", [{}, {"sparsity": 0.5}, 3, {"name": 4}, None])
def test_refuses_a_spec_without_a_name(spec):
    with pytest.raises(lc.ConfigError, match="name"):
        lc.compressors.create(spec)


def _plugins(monkeypatch, *points):
    monkeypatch.setattr("llmcompress.registry.entry_points", lambda group: points)
    return Registry("shape", group="shapes")


def test_a_broken_plugin_is_reported_only_when_it_is_asked_for(monkeypatch, tmp_path):
    (tmp_path / "broken_plugin.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "good_plugin.py").write_text("class Square: pass")
    monkeypatch.syspath_prepend(tmp_path)
    registry = _plugins(
        monkeypatch,
        EntryPoint("bad", "broken_plugin:X", "shapes"),
        EntryPoint("square", "good_plugin:Square", "shapes"),
    )
    assert registry.list() == ["bad", "square"]
    assert "good_plugin" not in sys.modules
    assert registry.get("square").__name__ == "Square"
    with pytest.raises(lc.PluginError, match=r"'bad'.*a_module_that_is_not_there"):
        registry.get("bad")


def test_the_same_registry_class_serves_tasks():
    assert isinstance(lc.tasks, Registry)
    assert {"text_classification", "language_modeling"} <= set(lc.tasks)


def test_public_names_resolve_and_agree_with_the_stub():
    import ast
    from pathlib import Path

    stub = ast.parse(Path(lc.__file__).with_suffix(".pyi").read_text())
    names = {alias.name for node in stub.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert names == set(lc.__all__)
    for name in lc.__all__:
        assert getattr(lc, name) is not None


def test_every_built_in_strategy_is_public(built_in_strategies):
    assert len(built_in_strategies) >= 10
    for cls in built_in_strategies.values():
        assert getattr(lc, cls.__name__) is cls


def test_import_is_light():
    import subprocess

    code = (
        "import sys, llmcompress as lc; lc.register; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
