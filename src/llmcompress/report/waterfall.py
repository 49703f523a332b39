"""A pipeline stage by stage: what each step took from the size, and from the score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import CompressionError
from ..evaluation.units import bytes_text, change_text, count_text, ratio_text, score_text
from ..registry import compressors

if TYPE_CHECKING:
    from ..anatomy.footprint import Footprint
    from ..comparison import Comparison
    from ..evaluation.tasks import TaskScore

_MOST_SETTINGS = 4


@dataclass(frozen=True)
class Stage:
    """The model after one step. `width` and `before` are its size and that of the stage before, in per cent of the
    largest stage; `better` tells whether the score left the 95 % interval of the stage before, upwards or downwards.
    """

    name: str
    settings: str
    size: str
    smaller: str
    width: float
    before: float
    zeros: str
    score: str
    moved: str
    better: bool | None
    seconds: str


@dataclass(frozen=True)
class Waterfall:
    """All stages of one candidate's pipeline, the base first."""

    name: str
    metric: str
    stages: tuple[Stage, ...]


def waterfalls(comparison: Comparison) -> list[Waterfall]:
    """Return one waterfall for each candidate whose run is known, the longest pipelines first."""
    found = []
    for entry in comparison.candidates:
        report = entry.report
        if report is None or not report.steps:
            continue
        largest = max(report.base.disk_bytes, *(record.footprint.disk_bytes for record in report.steps))
        stages = [_stage("base", {}, None, report.base, None, report.base_score, largest, None)]
        size, score = report.base, report.base_score
        for record in report.steps:
            name = str(record.step.get("name", "step"))
            settings = {key: value for key, value in record.step.items() if key != "name"}
            stages.append(_stage(name, settings, size, record.footprint, score, record.score, largest, record.seconds))
            size, score = record.footprint, record.score or score
        metric = next((one.primary for one in (report.base_score, *(r.score for r in report.steps)) if one), "")
        found.append(Waterfall(entry.name, metric, tuple(stages)))
    return sorted(found, key=lambda one: -len(one.stages))


def _stage(
    name: str,
    settings: Mapping[str, Any],
    before: Footprint | None,
    size: Footprint,
    score_before: TaskScore | None,
    score: TaskScore | None,
    largest: int,
    seconds: float | None,
) -> Stage:
    moved, better = "", None
    if score is not None and score_before is not None and score.primary == score_before.primary:
        moved = _moved(score, score_before)
        interval = score_before.intervals.get(score.primary)
        if interval is not None and not interval[0] <= score.value <= interval[1]:
            better = (score.value > score_before.value) == score.higher_is_better
    grown_zeros = size.zeros - before.zeros if before else 0.0
    return Stage(
        name=name.replace("_", " "),
        settings=_changed_settings(name, settings),
        size=bytes_text(size.disk_bytes),
        smaller=_smaller(before.disk_bytes / size.disk_bytes) if before and size.disk_bytes else "",
        width=round(100 * size.disk_bytes / largest, 2),
        before=round(100 * (before or size).disk_bytes / largest, 2),
        zeros=f"{size.zeros:.0%} zeros" if abs(grown_zeros) >= 0.05 else "",
        score=score_text(score.value, fraction=score.fraction) if score else "",
        moved=moved,
        better=better,
        seconds=f"{seconds:.1f} s" if seconds is not None else "",
    )


def _moved(score: TaskScore, before: TaskScore) -> str:
    if score.kind.scale == "ratio" and before.value:
        ratio = score.value / before.value
        return f"x{ratio:.4g}" if ratio < 1000 else f"x{count_text(ratio)}"
    return change_text(score.value, before.value, fraction=score.fraction)


def _smaller(ratio: float) -> str:
    text = ratio_text(ratio)
    return "" if text == "1.0x" else f"{text} smaller" if ratio > 1 else f"{ratio_text(1 / ratio)} larger"


def _changed_settings(name: str, settings: Mapping[str, Any]) -> str:
    """Write the settings that are not the strategy's defaults; all, where the strategy is not installed here."""
    try:
        fields = compressors.get(name).model_fields if name in compressors else {}
    except CompressionError:
        fields = {}  # a plug-in that does not load: its settings are still worth reading
    told = []
    for key, value in settings.items():
        plain = list(fields[key].default) if key in fields and isinstance(fields[key].default, tuple) else None
        if value is None or (key in fields and value in (fields[key].default, plain)):
            continue
        told.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    return ", ".join(told[:_MOST_SETTINGS]) + (" …" if len(told) > _MOST_SETTINGS else "")
