"""What a run returns: the model, and one report that knows every stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from rich.console import Console
from rich.table import Table

from .anatomy.footprint import Footprint
from .compressor import Action
from .evaluation.tasks import TaskScore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LIBRARIES = ("llmcompress", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy")


class StepRecord(BaseModel):
    """What one step did, as the runner measured it."""

    step: dict[str, Any] = Field(description="the step's recipe")
    seconds: float = Field(description="time of the step itself, evaluation not included")
    footprint: Footprint = Field(description="size of the model after the step")
    touched: list[Action] = Field(description="what was changed, and how")
    left: list[Action] = Field(description="what was left alone, and why; also remarks")
    score: TaskScore | None = Field(None, description="the task's score after the step, if a task was given")


class Report(BaseModel):
    """The account of a whole run; `model_dump_json()` writes it, `model_validate_json()` reads it back."""

    model: str
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    base: Footprint
    base_score: TaskScore | None = None
    steps: list[StepRecord] = Field(default_factory=list)

    def rows(self) -> list[dict[str, str]]:
        """Return the table's cells: a row for the base and one for each step, ratios to the base."""
        stages = [("base", self.base, None, self.base_score)]
        stages += [(record.step["name"], record.footprint, record, record.score) for record in self.steps]
        return [_row(name, size, record, score, self.base) for name, size, record, score in stages]

    def remarks(self) -> list[str]:
        """Return, for each step, why parts were left alone: one line a reason, with a count and an example."""
        lines = []
        for record in self.steps:
            reasons: dict[str, list[str]] = {}
            for action in record.left:
                reasons.setdefault(action.reason or "", []).append(action.path)
            for reason, paths in reasons.items():
                more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                lines.append(f"{record.step['name']}: {paths[0] or 'model'}{more} left alone: {reason}")
        return lines

    def __str__(self) -> str:
        rows = self.rows()
        table = Table(title=f"{self.model}, seed {self.seed}", title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if column == "stage" else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row.values())
        out = StringIO()
        console = Console(file=out, width=120)
        console.print(table)
        for line in self.remarks():
            console.print(f"- {line}", markup=False, highlight=False, soft_wrap=True)
        return out.getvalue().rstrip()

    def _repr_html_(self) -> str:
        from html import escape

        rows = self.rows()
        head = "".join(f"<th>{escape(column)}</th>" for column in rows[0])
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row.values()) + "</tr>" for row in rows)
        remarks = "".join(f"<li>{escape(line)}</li>" for line in self.remarks())
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><ul>{remarks}</ul>"


@dataclass
class Result:
    """A compressed model and its report.

    Attributes:
        model: the compressed model, on the device and in the mode of the one passed in.
        report: every stage, measured.
        tokenizer: saved beside the model, if there is one.
    """

    model: PreTrainedModel
    report: Report
    tokenizer: PreTrainedTokenizerBase | None = None

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write a folder that plain `from_pretrained` loads: config, safetensors, tokenizer, `llmcompress.json`.

        Raises:
            CheckpointError: the folder holds something else.
        """
        from .checkpoint import save

        return save(self.model, folder, tokenizer=self.tokenizer, metadata=json.loads(self.report.model_dump_json()))

    def __str__(self) -> str:
        return str(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def library_versions() -> dict[str, str]:
    """Return the installed versions of the libraries that shape a result."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _row(
    name: str, size: Footprint, record: StepRecord | None, score: TaskScore | None, base: Footprint
) -> dict[str, str]:
    row = {
        "stage": name,
        "parameters": f"{size.parameters / 1e6:.2f} M",
        "zeros": f"{size.zeros:.1%}",
        "on disk": f"{size.disk_bytes / 1e6:.2f} MB",
        "smaller": f"{base.disk_bytes / size.disk_bytes:.2f}x",
        "in memory": f"{size.memory_bytes / 1e6:.2f} MB",
        "seconds": f"{record.seconds:.1f}" if record else "",
        "touched": str(len(record.touched)) if record else "",
        "left": str(len(record.left)) if record else "",
    }
    if score is not None:
        row[score.primary] = f"{score.metrics[score.primary]:.4f}"
    return row
