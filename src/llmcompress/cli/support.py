"""The verb `support`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import Json, check_endings, tell


def support(
    architectures: Annotated[
        list[str] | None, typer.Argument(metavar="[ARCHITECTURE]...", help="patterns; all")
    ] = None,
    strategy: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="which strategies; all")] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="causal-lm, classification, ...; all")
    ] = None,
    out: Annotated[Path, typer.Option(help="finished entries; a second run continues")] = Path("support.jsonl"),
    page: Annotated[Path | None, typer.Option(help="write what was asked for as a Markdown page")] = None,
    workers: Annotated[int, typer.Option(min=1, metavar="N", help="processes side by side")] = 2,
    timeout: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="for one strategy on one model")] = 120.0,
    retry: Annotated[
        list[str] | None, typer.Option(metavar="STATUS", help="try again what was failed, refused...")
    ] = None,
    json: Json = None,
) -> None:
    """Try each strategy on a tiny model of every architecture in transformers; 1 if any result is wrong.

    llmcompress support llama 'qwen*' --task causal-lm
    """
    check_endings({".json": json})
    from dataclasses import asdict
    from json import dumps

    from ..places import check_place
    from ..support.matrix import choose_jobs, run
    from ..support.page import page as rendered
    from ..support.page import totals

    jobs = choose_jobs(architectures or (), strategy or (), task or ())
    if page is not None:
        check_place(page)
    entries = run(jobs, out, workers=workers, timeout=timeout, retry=retry or ())
    failed = [entry for entry in entries if entry.status == "failed"]
    lines = [f"failed: {entry.task} {entry.architecture} {entry.strategy}: {entry.note}" for entry in failed]
    document = dumps([asdict(entry) for entry in entries], indent=1)
    tell("\n".join([totals(entries).text(), *lines]), document, json)
    if page is not None:
        page.write_text(rendered(entries), encoding="utf-8")
    if failed:
        raise typer.Exit(1)
