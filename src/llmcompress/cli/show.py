"""The verb `show`."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Json, check_endings, tell


def show(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="a model folder, compressed or not")],
    json: Json = None,
) -> None:
    """Tell what is in a model folder: sizes, layers, bits, and the recipe and scores of a compressed one.

    llmcompress show small

    llmcompress show small --json -
    """
    check_endings({".json": json})
    from ..contents import show as read

    found = read(folder)
    tell(str(found), found.model_dump_json(indent=2), json)
