"""Recipe files: written so that they are read back as the same steps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ..places import told_if_unwritable
from .document import scalar
from .renames import VERSION


def write_recipe(recipe: Mapping[str, Any], path: str | Path, *, description: str | None = None) -> None:
    """Write what `Pipeline.to_dict` returned to a file, with the version of the format.

    Args:
        recipe: a pipeline's dict.
        path: of the file; replaced if it is there.
        description: what the recipe is for; readers pass over it.

    Raises:
        CheckpointError: the file cannot be written.
    """
    told = {} if description is None else {"description": description}
    steps = {key: value for key, value in recipe.items() if key != "name"}
    text = yaml.dump({"version": VERSION, **told, **steps}, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    with told_if_unwritable(path):
        Path(path).write_text(text, encoding="utf-8")


_ODD_BREAKS = frozenset("\x85\u2028\u2029")


class _Dumper(yaml.SafeDumper):
    """Quotes also those texts that only YAML 1.2 takes for numbers, such as `1e5`; and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = None if isinstance(scalar(data), str) else "'"
    if _ODD_BREAKS.intersection(data):
        style = '"'  # where PyYAML writes them as escapes; in its other styles they come back as spaces
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(str, _text)
