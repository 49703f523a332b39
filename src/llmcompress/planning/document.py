"""What a plan is: a document of plain values, as a table with a tree under it, for a notebook, and as JSON."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, Field

from ..compressor import Action
from ..evaluation.table import Table
from ..evaluation.units import bytes_text, count_text, ratio_text, seconds_text
from .lines import lines
from .loading import Loading


class PlannedSize(BaseModel, frozen=True, extra="forbid"):
    """How big the model will be at one stage; tied weights counted once."""

    parameters: int = Field(description="weights, whatever their encoding")
    disk_bytes: int = Field(description="bytes of the safetensors file, header included")
    memory_bytes: int = Field(description="bytes of all tensors in memory")
    zeros: float | None = Field(
        description="share of weights that are zero, in [0, 1]; None where codes stand for them"
    )


class PlannedStep(BaseModel, frozen=True, extra="forbid"):
    """What one step will do."""

    step: dict[str, Any] = Field(description="the step's recipe")
    size: PlannedSize | None = Field(description="of the model after the step; None where it is not predicted")
    peak_bytes: int | None = Field(
        description="about how many bytes all tensors of the run take at most during the step, the original included"
    )
    rough_seconds: float | None = Field(
        description="rough: of the step itself on this machine, from short measurements of its arithmetic"
    )
    estimated: str | None = Field(description="why the real size may be another one; None where it is exact")
    touched: list[Action] = Field(description="what will be changed, and how")
    left: list[Action] = Field(description="what will be left alone, and why; also remarks")

    @property
    def name(self) -> str:
        """The step's name in the registry."""
        return str(self.step["name"])


class Plan(BaseModel, frozen=True, extra="forbid"):
    """What a chain of steps will do to a model, as `lc.plan` found it; `model_dump_json()` writes it."""

    model: str = Field(description="the model's class")
    recipe: dict[str, Any] = Field(description="of the chain")
    seed: int = Field(description="of the run")
    base: PlannedSize = Field(description="of the model as it is")
    steps: list[PlannedStep] = Field(description="the steps, first to last")
    loads_in: list[Loading] = Field(
        description="what the folder of the result loads in; empty where it is not predicted"
    )
    computed_by: list[str] = Field(description="what multiplies by the weights of each coded form on this machine")
    gives_not: list[str] = Field(description="what the result will not give")

    def table(self) -> Table:
        """Return a row for the model as it is, and one for each step."""
        header = (
            "stage",
            "parameters",
            "zeros",
            "on disk",
            "smaller",
            "in memory",
            "peak",
            "rough time",
            "touched",
            "left",
        )
        rows = [_row("base", self.base, self.base, None)]
        rows += [_row(step.name, step.size, self.base, step) for step in self.steps]
        return Table(header, rows, title=f"plan for {self.model}, seed {self.seed}")

    def __repr__(self) -> str:
        return f"Plan({self.model}, {len(self.steps)} steps)"

    def __str__(self) -> str:
        return "\n".join([self.table().text(), "", *_drawn(self._tree())])

    def _repr_html_(self) -> str:
        parts = [self.table().html()]
        for title, leaves in self._tree():
            items = "".join(f"<li>{html.escape(leaf)}</li>" for leaf in leaves)
            parts.append(f"<details open><summary>{html.escape(title)}</summary><ul>{items}</ul></details>")
        return "".join(parts)

    def _tree(self) -> Iterator[tuple[str, list[str]]]:
        """Yield each branch with its leaves."""
        for number, step in enumerate(self.steps, 1):
            leaves = lines(step.touched) + lines(step.left)
            if step.size is None:
                leaves.append("sizes from here on are not predicted: this step does not tell them beforehand")
            elif step.estimated is not None:
                leaves.append(f"sizes are estimates: {step.estimated}")
            yield f"{number}. {step.name}", leaves
        if self.loads_in:
            answers = {True: "yes", False: "no", None: "maybe"}
            yield "loads in", [f"{one.runtime}: {answers[one.loads]}, {one.why}" for one in self.loads_in]
        if self.computed_by:
            yield "computed by", self.computed_by
        if self.gives_not:
            yield "will not give", self.gives_not


def _drawn(tree: Iterator[tuple[str, list[str]]]) -> Iterator[str]:
    for title, leaves in tree:
        yield title
        for number, leaf in enumerate(leaves, 1):
            yield f"{'└─' if number == len(leaves) else '├─'} {leaf}"


def _row(name: str, size: PlannedSize | None, base: PlannedSize, step: PlannedStep | None) -> list[str]:
    counts, costs = ["", ""], ["", ""]
    if step is not None:
        costs = [
            "?" if step.peak_bytes is None else f"~{bytes_text(step.peak_bytes)}",
            "?" if step.rough_seconds is None else f"~{seconds_text(step.rough_seconds)}",
        ]
        counts = [str(len({a.path for a in actions} - {""})) for actions in (step.touched, step.left)]
    if size is None:
        return [name, "?", "?", "?", "?", "?", *costs, *counts]
    about = "~" if step is not None and step.estimated else ""
    return [
        name,
        about + count_text(size.parameters),
        "" if size.zeros is None else f"{size.zeros:.1%}",
        about + bytes_text(size.disk_bytes),
        ratio_text(base.disk_bytes / size.disk_bytes),
        about + bytes_text(size.memory_bytes),
        *costs,
        *counts,
    ]
