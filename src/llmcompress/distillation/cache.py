"""A teacher's answers kept on disk: what is kept of them, for which teacher and rows, and at which price."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from ..compressor import Settings
from ..errors import ConfigError
from .batches import Row
from .cache_store import FORMAT_VERSION, remove
from .heads import LANGUAGE_MODELS, Head

_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}
# What of a row decides what the teacher answers, and where.
_READ = ("input_ids", "token_type_ids", "attention_mask", "counted")


class TeacherCache(Settings):
    """Where the teacher's answers are kept, so that it runs over the rows once and not in every epoch.

    A language model's answer to a token is kept as the log-probabilities of its `top_k` likeliest tokens, at the step's
    temperature, and the one of all others together, which the losses take as one class more. Answers that take no more
    space whole are kept so, for any temperature: those of classifiers, and of small vocabularies. Students, epochs and
    processes share a folder: an entry of it belongs to one teacher (by its weights), one set of rows and these
    settings, so an outdated one is never read. A pass that was killed goes on where it stopped, and a teacher whose
    answers are all there is not loaded.

    Args:
        folder: where the entries are; made if absent.
        top_k: tokens whose probabilities are kept one by one.
        hidden: hidden states that are kept as well, for `features`: 0 is what enters the first block, i what leaves
            block i - 1.
        dtype: of log-probabilities and hidden states.

    Example:
        >>> TeacherCache(folder="answers").bytes_per_answer("causal_lm", 32000)
        258
        >>> TeacherCache(folder="answers", hidden=(0, 6)).bytes_per_token(768)
        3072
    """

    folder: str = Field(description="where the entries are; made if absent")
    top_k: int = Field(64, ge=1, description="tokens whose probabilities are kept one by one")
    hidden: tuple[int, ...] = Field((), description="hidden states that are kept: 0 enters the first block")
    dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="of what is kept")

    @field_validator("folder", mode="before")
    @classmethod
    def _as_text(cls, folder: Any) -> Any:
        return str(folder) if isinstance(folder, Path) else folder

    @field_validator("folder")
    @classmethod
    def _named(cls, folder: str) -> str:
        # Nothing would be the working directory, among whose folders entries do not belong.
        if not folder.strip():
            raise ConfigError(
                f"TeacherCache.folder must name a folder, got {folder!r}; pass one for the answers, such as 'answers'."
            )
        return folder

    @field_validator("hidden")
    @classmethod
    def _ascending(cls, hidden: tuple[int, ...]) -> tuple[int, ...]:
        if any(index < 0 for index in hidden) or len(set(hidden)) < len(hidden):
            raise ConfigError(f"TeacherCache.hidden must name hidden states from 0 on, each once, got {hidden}.")
        return tuple(sorted(hidden))

    def keeps_all(self, head: Head, classes: int) -> bool:
        """Tell whether answers of so many classes are kept whole.

        Example:
            >>> [TeacherCache(folder="answers").keeps_all("causal_lm", classes) for classes in (129, 130)]
            [True, False]
        """
        return head not in LANGUAGE_MODELS or classes * _BYTES[self.dtype] <= self._of_likeliest(classes)

    def bytes_per_answer(self, head: Head, classes: int) -> int:
        """Return what an entry takes for each position that counts, in bytes.

        Args:
            head: from `head_of`.
            classes: how many the teacher tells apart.
        """
        return classes * _BYTES[self.dtype] if self.keeps_all(head, classes) else self._of_likeliest(classes)

    def bytes_per_token(self, width: int) -> int:
        """Return what hidden states take besides, in bytes: of each token, whether it counts or not, of each stack.

        Args:
            width: of the teacher's hidden states.
        """
        return len(self.hidden) * width * _BYTES[self.dtype]

    def remove_entries(self, *, unused_days: float = 0.0) -> list[Path]:
        """Delete the entries in the folder that no training has read for some days, finished or not.

        An entry that a process is writing is left alone, and so is whatever is no entry.

        Args:
            unused_days: 0 deletes all.

        Returns:
            The folders of entries that are gone.

        Raises:
            ConfigError: `unused_days` is negative.
        """
        if not unused_days >= 0:
            raise ConfigError(f"TeacherCache.remove_entries.unused_days must be at least 0, got {unused_days!r}.")
        return remove(Path(self.folder), unused_days=unused_days)

    def _of_likeliest(self, classes: int) -> int:
        """Return the bytes of the likeliest tokens, their numbers, and the rest."""
        return (self.top_k + 1) * _BYTES[self.dtype] + self.top_k * token_bytes(classes)


def token_bytes(classes: int) -> int:
    """Return how many bytes the number of a token takes."""
    return 2 if classes <= np.iinfo(np.uint16).max + 1 else 4


def rows_digest(head: Head, rows: Sequence[Row]) -> str:
    """Return a hash of all that a teacher reads of the rows, and of the positions at which it is asked.

    Example:
        >>> row = {"input_ids": [1, 2], "attention_mask": [1, 1]}
        >>> one, other = ([{**row, "labels": label}] for label in (0, 1))
        >>> rows_digest("classification", one) == rows_digest("classification", other)
        True
    """
    digest = hashlib.sha256(head.encode())
    names = (*_READ, "labels") if head in LANGUAGE_MODELS else _READ
    for row in rows:
        for name in names:
            if name in row:
                numbers = np.asarray(row[name], dtype=np.int64)
                digest.update(f"{name} {numbers.size} ".encode())
                digest.update(numbers.tobytes())
    return digest.hexdigest()


def entry_name(settings: Mapping[str, Any]) -> str:
    """Return the name of the entry that belongs to all of `settings`.

    Example:
        >>> len(entry_name({"teacher": "ab12", "rows": "cd34"}))
        24
    """
    told = repr(sorted({**settings, "format_version": FORMAT_VERSION}.items()))
    return hashlib.sha256(told.encode()).hexdigest()[:24]
