"""The support matrix for readers: totals as a table, and the whole of it as a Markdown page."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from ..evaluation.table import Table
from .checks import STRATEGIES
from .entries import Entry
from .tiny_models import TASKS

_SIGNS = {"verified": "yes", "refused": "no", "failed": "**FAILED**", "absent": "", "not built": ""}
_LOADS = "loads with llmcompress"
_REASON_CHARACTERS = 170
_PATH = re.compile(r"\b[a-z_]\w*(?:\.\w+)*\.\d+(?:\.\w+)*")
_MODULES = re.compile(r"a module(?:(?:, | and )a module)+")
_HEAD = """# Supported architectures

What each pruning strategy, and quantization, does on a tiny random model of every architecture that transformers knows
under these tasks; made by `llmcompress support --page docs/support.md`.

- **yes**: verified. The cut model gives the outputs of the whole model in which the same parts are silenced (to 1e-4,
  relative, on two batches, one of them padded); its folder comes back by plain `from_pretrained` with equal outputs, if
  that of the whole model does; where the model generates with a cache as without, it still does. For zeros: half of the
  weights, to 1 %, are zero, the others untouched. For the vocabulary: the answers in the new ids are those in the old
  ones. For quantization: in int8 the outputs are about those of the float model, in 4 bits those of the weights that
  the codes mean; less is stored.
- **yes**\\*: the same, with sizes that no plain config tells (`uniform=False`); loads after `import llmcompress`.
- **no**: refused with a reason, see below. Empty: the model has no such part.

A tiny random model shows whether the surgery is right, not what quality is left.
"""


def totals(entries: Sequence[Entry]) -> Table:
    """Return how many architectures each strategy was verified on, for each task."""
    rows = []
    for task in TASKS:
        own = [entry for entry in entries if entry.task == task and entry.status != "not built"]
        for strategy in _strategies(own):
            counts = Counter(entry.status for entry in own if entry.strategy == strategy)
            asked = sum(counts.values()) - counts["absent"]
            share = f"{counts['verified'] / asked:.0%}" if asked else ""
            numbers = [str(counts[status]) for status in ("verified", "refused", "failed")]
            rows.append([TASKS[task].title, strategy, *numbers, share])
    header = ["task", "strategy", "verified", "refused", "failed", "verified of those with such a part"]
    return Table(header, rows, title="support matrix", notes=_notes(entries))


def page(entries: Sequence[Entry]) -> str:
    """Return the Markdown page.

    Example:
        >>> from llmcompress.support.entries import Entry
        >>> entry = Entry("causal-lm", "llama", "LlamaForCausalLM", "ffn", "verified", versions={"torch": "2.13.0"})
        >>> print(page([entry]).splitlines()[-1])
        | `llama` | yes |
    """
    versions = ", ".join(f"{name} {number}" for name, number in entries[0].versions.items()) if entries else ""
    parts = [_HEAD, f"Made with {versions}.", "", replace(totals(entries), title="").markdown()]
    for task in TASKS.values():
        own = [entry for entry in entries if entry.task == task.key]
        if own:
            parts += ["", f"## {task.title}", "", *_matrix(own), *_reasons(own)]
    return "\n".join(parts) + "\n"


def _strategies(entries: Sequence[Entry]) -> list[str]:
    return [name for name in STRATEGIES if any(entry.strategy == name for entry in entries)]


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = []
    for key, task in TASKS.items():
        own: dict[str, dict[str, str]] = defaultdict(dict)
        for entry in entries:
            if entry.task == key:
                own[entry.architecture][entry.strategy] = entry.status
        built = [found for found in own.values() if "not built" not in found.values()]
        if not built:
            continue
        either = sum("verified" in (found.get("ffn"), found.get("depth")) for found in built)
        heads = sum(found.get("heads") == "verified" for found in built)
        notes.append(
            f"{task.title}: {len(built)} of {len(own)} tiny configs build and run; FFN or depth verified for "
            f"{either / len(built):.0%} of them, heads for {heads / len(built):.0%}."
        )
    return notes


def _matrix(entries: Sequence[Entry]) -> list[str]:
    strategies = _strategies(entries)
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for entry in entries:
        if entry.status != "not built":
            starred = entry.status == "verified" and _LOADS in entry.note
            cells[entry.architecture][entry.strategy] = "yes\\*" if starred else _SIGNS[entry.status]
    lines = [f"| architecture | {' | '.join(strategies)} |", f"|---{'|---' * len(strategies)}|"]
    for name, row in sorted(cells.items()):
        lines.append(f"| `{name}` | {' | '.join(row.get(strategy, '') for strategy in strategies)} |")
    return lines


def _reasons(entries: Sequence[Entry]) -> list[str]:
    """Group what failed, what was refused or not built, and remarks, names of models and modules aside."""
    lines: list[str] = []
    for status, title in (
        ("failed", "Failed"),
        ("refused", "Refused"),
        ("not built", "Not built"),
        ("verified", "Remarks"),
    ):
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for entry in entries:
            # Of what is verified the star in the table tells where it loads; any other remark is told here.
            note = "; ".join(part for part in entry.note.split("; ") if part != _LOADS)
            if entry.status == status and (note or status != "verified"):
                reason = _MODULES.sub("some modules", _PATH.sub("a module", note.replace(entry.model, "the model")))
                short = reason if len(reason) <= _REASON_CHARACTERS else f"{reason[:_REASON_CHARACTERS]}..."
                names = groups["" if status == "not built" else entry.strategy, short.replace("|", "\\|")]
                if entry.architecture not in names:
                    names.append(entry.architecture)
        if groups:
            lines += ["", f"### {title}", ""]
            for (strategy, reason), names in sorted(groups.items(), key=lambda item: (item[0][0], -len(item[1]))):
                lines.append(f"- {f'{strategy}: ' if strategy else ''}{', '.join(names)}: {reason}")
    return lines
