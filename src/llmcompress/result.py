"""What a run returns: the model, and one report that knows every stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field

from .anatomy.footprint import Footprint
from .compressor import Action
from .evaluation.fidelity import Fidelity
from .evaluation.latency import Speedup
from .evaluation.table import Table
from .evaluation.tasks import TaskScore
from .evaluation.units import bytes_text, count_text, ratio_text
from .gates import OnFail, Verdict, failures

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# From this share of all weights on, zeros that a step left are worth a word.
TOLD_ZEROS = 0.01
_LIBRARIES = ("llmcompress", "torch", "transformers", "bitsandbytes", "accelerate", "safetensors", "numpy")


class StepRecord(BaseModel):
    """What one step did, as the runner measured it."""

    step: dict[str, Any] = Field(description="the step's recipe")
    seconds: float | None = Field(None, description="time of the step itself, evaluation not included, if it is known")
    footprint: Footprint = Field(description="size of the model after the step")
    touched: list[Action] = Field(description="what was changed, and how")
    left: list[Action] = Field(description="what was left alone, and why; also remarks")
    score: TaskScore | None = Field(None, description="the task's score after the step, if a task was given")
    fidelity: Fidelity | None = Field(
        None, description="how closely the answers are the base's, where a gate asked for both side by side"
    )
    verdicts: tuple[Verdict, ...] = Field((), description="what each gate found, in their order")
    speedup: Speedup | None = Field(
        None,
        description="time of the base over that of the model now, measured in turns; None if the step left its size",
    )


class Report(BaseModel):
    """The account of a whole run; `model_dump_json()` writes it, `model_validate_json()` reads it back."""

    model: str
    recipe: dict[str, Any]
    seed: int
    versions: dict[str, str]
    base: Footprint
    base_score: TaskScore | None = None
    gates: list[dict[str, Any]] = Field(default_factory=list, description="what each stage was held against")
    on_fail: OnFail | None = Field(None, description="what was to be done with a stage that failed one")
    steps: list[StepRecord] = Field(default_factory=list, description="the steps that the model has gone through")
    rolled_back: StepRecord | None = Field(None, description="the step that failed a gate and was undone")
    not_run: list[dict[str, Any]] = Field(default_factory=list, description="recipes of the steps behind that one")
    speedup: Speedup | None = Field(None, description="time of the base over that of the result, measured in turns")

    def table(self) -> Table:
        """Return a row for the base and one for each step, ratios to the base, with the remarks as notes."""
        undone = [self.rolled_back] if self.rolled_back is not None else []
        scored = [
            score for score in (self.base_score, *(one.score for one in self.steps + undone)) if score is not None
        ]
        header = ["stage", "parameters", "zeros", "on disk", "smaller", "in memory", "seconds", "touched", "left"]
        if scored:
            header.append(scored[0].primary)
        rows = [_row("base", self.base, None, self.base_score, self.base)]
        for record in self.steps:
            rows.append(_row(record.step["name"], record.footprint, record, record.score, self.base))
        for record in undone:
            name = f"{record.step['name']} (rolled back)"
            rows.append(_row(name, record.footprint, record, record.score, self.base))
        return Table(header, rows, title=f"{self.model}, seed {self.seed}", notes=self.remarks())

    def remarks(self) -> list[str]:
        """Return failed gates, measured speeds, what zeros gave, and why parts were left alone: a line a reason."""
        lines = self.failed()
        if self.speedup is not None:
            lines.append(_speed(self.speedup))
        before = self.base
        for record in self.steps:
            if _only_zeros(before, record.footprint):
                lines.append(f"{record.step['name']}: {_zeros_told(record)}")
            elif record.speedup is not None and record.speedup != self.speedup:
                lines.append(f"{record.step['name']}: {_speed(record.speedup)}")
            before = record.footprint
            reasons: dict[str, list[str]] = {}
            for action in record.left:
                reasons.setdefault(action.reason or "", []).append(action.path)
            for reason, paths in reasons.items():
                if set(paths) == {""}:
                    lines.append(f"{record.step['name']}: {reason}")
                else:
                    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
                    lines.append(f"{record.step['name']}: {paths[0]}{more} left alone: {reason}")
        return lines

    def failed(self) -> list[str]:
        """Return a line for each stage that failed a gate: by how much, and what was done with it."""
        lines = [f"{one.step['name']}: failed {failed}" for one in self.steps if (failed := failures(one.verdicts))]
        if self.rolled_back is not None:
            left = self.steps[-1].step["name"] if self.steps else "the base, unchanged"
            behind = f"; not run: {', '.join(step['name'] for step in self.not_run)}" if self.not_run else ""
            failed = failures(self.rolled_back.verdicts)
            lines.append(f"{self.rolled_back.step['name']}: failed {failed}; rolled back to {left}{behind}")
        return lines

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


@dataclass(repr=False)
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

        # Scores go into the folder; what each single example got would make it bigger than some models.
        unscored: Any = {
            "base_score": {"examples"},
            "steps": {"__all__": {"score": {"examples"}}},
            "rolled_back": {"score": {"examples"}},
        }
        metadata = json.loads(self.report.model_dump_json(exclude=unscored))
        return save(self.model, folder, tokenizer=self.tokenizer, metadata=metadata)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({type(self.model).__name__}, {len(self.report.steps)} steps)"

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


def _speed(found: Speedup) -> str:
    interval = f"({found.low:.2f} to {found.high:.2f})"
    shape = f"{found.batch_size}x{found.tokens} tokens" if found.tokens else f"{found.batch_size} image"
    return f"{found.ratio:.2f}x the base's speed on {shape}, measured here {interval}"


def _only_zeros(before: Footprint, after: Footprint) -> bool:
    return after.zeros - before.zeros > TOLD_ZEROS and after.disk_bytes == before.disk_bytes


def _zeros_told(record: StepRecord) -> str:
    """Say what zeros in dense tensors give; of their speed only what was measured."""
    told = f"{record.footprint.zeros:.0%} of all weights are zeros, 0 % smaller on disk"
    found = record.speedup
    if found is None:
        return f"{told}: dense tensors hold them"
    if found.low <= 1 <= found.high:
        return f"{told}, 0 % faster here ({found.low:.2f} to {found.high:.2f}): dense tensors hold and multiply them"
    return f"{told}, {found.ratio:.2f}x the speed in this short timing, though the same products run"


def _row(name: str, size: Footprint, record: StepRecord | None, score: TaskScore | None, base: Footprint) -> list[str]:
    row = [
        name,
        count_text(size.parameters),
        f"{size.zeros:.1%}",
        bytes_text(size.disk_bytes),
        ratio_text(base.disk_bytes / size.disk_bytes),
        bytes_text(size.memory_bytes),
        f"{record.seconds:.1f}" if record and record.seconds is not None else "",
        str(len({action.path for action in record.touched})) if record else "",
        str(len({action.path for action in record.left} - {""})) if record else "",
    ]
    return row if score is None else [*row, f"{score.metrics[score.primary]:.4f}"]
