"""A teacher that is read from disk: one pass of the live one writes what it answers to each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from .answers import Answers, likeliest
from .batches import Row
from .cache import TeacherCache, token_bytes
from .cache_store import Array, Store, begin, finish, lock_of, open_finished
from .heads import Batch, Head, counted
from .objective import Objective
from .observation import Observed, Teacher

Collator: TypeAlias = Callable[[Sequence[Row]], dict[str, torch.Tensor]]

# Rows whose positions are counted at once.
_CHUNK = 256
# Batches between two times that the disk is asked to hold what was written.
_FLUSH = 200
_MASKED = torch.finfo(torch.float32).min / 4


@dataclass(frozen=True)
class Layout:
    """Where the answers to each row lie.

    Attributes:
        answers: index of the first position of each row, and the end: (rows + 1,).
        tokens: for each stack the index of the first token of each row, and the end: (rows + 1,).
    """

    answers: np.ndarray[Any, np.dtype[np.int64]]
    tokens: tuple[np.ndarray[Any, np.dtype[np.int64]], ...]

    @classmethod
    def of(cls, rows: Sequence[Row], collator: Collator, objective: Objective) -> Layout:
        """Count the positions of the rows."""
        positions: list[torch.Tensor] = []
        tokens: list[list[torch.Tensor]] = []
        for start in range(0, len(rows), _CHUNK):
            batch = collator(rows[start : start + _CHUNK])
            positions.append(_per_row(objective.head, batch))
            tokens.append([mask.sum(1) for mask in objective.token_masks(batch)])
        return cls(_starts(positions), tuple(_starts(stack) for stack in zip(*tokens, strict=True)))

    def spans(self, rows: Sequence[int], stack: int | None = None) -> list[tuple[int, int]]:
        """Return where the positions of these rows lie; with `stack` their tokens."""
        starts = self.answers if stack is None else self.tokens[stack]
        return [(int(starts[row]), int(starts[row + 1])) for row in rows]


class CachedTeacher:
    """Reads what a teacher answered; called with a batch like the teacher itself.

    Args:
        store: a finished one.
        layout: of the same rows.
        objective: tells head and positions.
        hidden: the hidden states that it holds.

    Attributes:
        positions: how many answers it holds.
        nbytes: what it takes on disk.
        size: the same for a report.
    """

    def __init__(self, store: Store, layout: Layout, objective: Objective, hidden: Sequence[int]) -> None:
        self._store, self._layout, self._objective, self._hidden = store, layout, objective, hidden
        self.positions = int(layout.answers[-1])
        self.nbytes = sum(array.nbytes for array in store.arrays.values())
        answers = sum(array.nbytes for name, array in store.arrays.items() if name in _FIELDS)
        self.size = f"{self.nbytes / 1e6:.3g} MB, {answers / max(self.positions, 1):.4g} bytes an answer"
        if hidden:
            tokens = sum(int(starts[-1]) for starts in layout.tokens)
            self.size += f" and {(self.nbytes - answers) / max(tokens, 1):.4g} bytes a token"

    def __call__(self, batch: Batch) -> Observed:
        """Return the answers to the rows of a batch, which `batch["row"]` names."""
        rows = batch["row"].tolist()
        mask = counted(self._objective.head, batch)
        spans = self._layout.spans(rows)
        if self._objective.head == "question_answering":
            answers = Answers(self._ends(batch, spans))
        else:
            read = {name: self._store.read(name, spans) for name in ("answers", "tokens") if name in self._store.arrays}
            answers = Answers(**{_FIELDS[name]: _placed(values, mask) for name, values in read.items()})
        states = [
            {index: _placed(self._store.read(f"hidden_{stack}_{index}", self._layout.spans(rows, stack)), inside)
             for index in self._hidden}
            for stack, inside in enumerate(self._objective.token_masks(batch))
        ]  # fmt: skip
        return Observed(outputs=None, states=states, answers=answers)

    def _ends(self, batch: Batch, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The classes of a reader are the places of its row: each row has as many as it has tokens."""
        lengths = batch["attention_mask"].sum(1).tolist()
        logits = torch.full((len(spans), 2, batch["input_ids"].shape[1]), _MASKED)
        for number, (span, length) in enumerate(zip(spans, lengths, strict=True)):
            logits[number, :, :length] = self._store.read("answers", [span]).view(2, length)
        return logits.to(batch["input_ids"].device)


_FIELDS = {"answers": "logits", "tokens": "tokens"}


def cached_teacher(
    live: Callable[[], AbstractContextManager[Teacher]],
    settings: TeacherCache,
    entry: str,
    about: Mapping[str, Any],
    rows: Sequence[Row],
    objective: Objective,
    *,
    collator: Collator,
    temperature: float,
    batch_size: int,
    progress: bool,
) -> CachedTeacher:
    """Return the teacher of an entry; if it is not there yet, run the live one over the rows and write it.

    Of several processes one writes, and the others wait for it.

    Args:
        live: gives the teacher; called only where it must run.
        settings: the cache.
        entry: its name in the cache's folder.
        about: what is told of it in its folder.
        rows: those that it shall answer.
        objective: tells head, positions and classes.
        collator: makes batches of rows.
        temperature: of the step; applied where only the likeliest tokens are kept.
        batch_size: rows that the teacher runs over at once.
        progress: whether a bar is wanted.

    Raises:
        CheckpointError: the entry is damaged, or there is no room for it.
    """
    folder = Path(settings.folder) / entry
    layout = Layout.of(rows, collator, objective)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.exists():
        with FileLock(lock_of(folder)):
            if not folder.exists():
                draft = folder.with_suffix(".partial")
                with live() as teacher, torch.no_grad():
                    writer = _Writer(settings, draft, about, layout, objective, temperature)
                    order = sorted(range(len(rows)), key=lambda row: -len(rows[row]["input_ids"]))
                    batches = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
                    for number, batch in enumerate(
                        tqdm(batches, desc="teacher", unit="batch", disable=not progress, leave=False)
                    ):
                        asked = [row for row in batch if not writer.has(row)]
                        if asked:
                            collated = collator([rows[row] for row in asked])
                            writer.write(asked, collated, teacher(collated))
                        if number % _FLUSH == _FLUSH - 1:
                            writer.flush()
                    writer.flush()
                finish(draft, folder)
    return CachedTeacher(open_finished(folder, len(rows)), layout, objective, settings.hidden)


class _Writer:
    """Writes the answers to rows in the layout; the first ones tell how wide the files are."""

    def __init__(
        self,
        settings: TeacherCache,
        draft: Path,
        about: Mapping[str, Any],
        layout: Layout,
        objective: Objective,
        temperature: float,
    ) -> None:
        self._settings, self._draft, self._about, self._layout = settings, draft, about, layout
        self._objective, self._temperature = objective, temperature
        self._store: Store | None = None

    def has(self, row: int) -> bool:
        return self._store is not None and bool(self._store.done[row])

    def flush(self) -> None:
        if self._store is not None:
            self._store.flush()

    def write(self, rows: Sequence[int], batch: Batch, seen: Observed) -> None:
        answers = self._objective.answers(seen, batch)
        classes = answers.logits.shape[-1]
        sparse = not self._settings.keeps_all(self._objective.head, classes)
        if self._store is None:
            self._store = begin(
                self._draft, self._arrays(classes, seen, sparse), len(self._layout.answers) - 1, self._about
            )
        mask = counted(self._objective.head, batch)
        kept = answers.logits[mask]
        found = likeliest(kept, self._settings.top_k, self._temperature) if sparse else Answers(kept)
        parts = {"answers": found.logits} if found.tokens is None else {"answers": found.logits, "tokens": found.tokens}
        sizes = mask.reshape(len(mask), -1).sum(1).tolist()
        lengths = batch["attention_mask"].sum(1).tolist()
        for name, values in parts.items():
            places = zip(self._layout.spans(rows), values.split(sizes), lengths, strict=True)
            for (start, _), block, length in places:
                whole = block[:, :length] if self._objective.head == "question_answering" else block
                self._store.write(name, start, whole)
        for stack, inside in enumerate(self._objective.token_masks(batch)):
            spans = self._layout.spans(rows, stack)
            for index in self._settings.hidden:
                state = seen.states[stack][index]
                for (start, _), values, own in zip(spans, state, inside.to(state.device), strict=True):
                    self._store.write(f"hidden_{stack}_{index}", start, values[own])
        for row in rows:
            self._store.done[row] = 1

    def _arrays(self, classes: int, seen: Observed, sparse: bool) -> dict[str, Array]:
        dtype, positions = self._settings.dtype, int(self._layout.answers[-1])
        if self._objective.head == "question_answering":
            classes = 1
        arrays = {"answers": Array(dtype, self._settings.top_k + 1 if sparse else classes, positions)}
        if sparse:
            arrays["tokens"] = Array(
                "uint16" if token_bytes(classes) == 2 else "int32", self._settings.top_k, positions
            )
        for stack, starts in enumerate(self._layout.tokens):
            for index in self._settings.hidden:
                width = seen.states[stack][index].shape[-1]
                arrays[f"hidden_{stack}_{index}"] = Array(dtype, width, int(starts[-1]))
        return arrays


def _per_row(head: Head, batch: Batch) -> torch.Tensor:
    """Return how many entries the answers to each row take."""
    mask = counted(head, batch)
    positions = mask.reshape(len(mask), -1).sum(1)
    return positions * batch["attention_mask"].sum(1) if head == "question_answering" else positions


def _starts(counts: Sequence[torch.Tensor]) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.concatenate([[0], torch.cat(list(counts)).numpy().cumsum()]).astype(np.int64)


def _placed(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put entries (count, width) where `mask` (...) is set, and zeros elsewhere: (..., width)."""
    values = values.to(mask.device)
    whole = values.new_zeros(*mask.shape, values.shape[-1])
    whole[mask] = values
    return whole
