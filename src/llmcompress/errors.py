"""Every error the library raises on purpose.

One tree, so that a caller can catch `CompressionError` and be done, and each branch also is the builtin that fits
(`ValueError`, `TypeError`, `LookupError`...). A message says who.what must be X, got Y; and what to do.

>>> issubclass(ConfigError, ValueError) and issubclass(ConfigError, CompressionError)
True
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .result import Report


class CompressionError(Exception):
    """Root of the tree: anything llmcompress refuses or cannot do.

    Args:
        message: what is wrong, and what to do.
        location: keys and indices that lead to the value at fault, outermost first; a recipe file makes a line of it.

    Example:
        >>> ConfigError("GPTQ.bits must be in [2, 8], got 9.", location=("bits",)).location
        ('bits',)
    """

    def __init__(self, message: str = "", *, location: Iterable[str | int] = ()) -> None:
        super().__init__(message)
        self.location = tuple(location)


class ConfigError(CompressionError, ValueError):
    """A hyper-parameter is outside its range, unknown, or contradicts another one."""


class PipelineOrderError(CompressionError, ValueError):
    """A step would undo or misread what an earlier step did, such as pruning after quantization."""


class MissingInputError(CompressionError, ValueError):
    """A step or a task needs data, labels, a teacher or a tokenizer that was not passed, or that is empty."""


class NothingToCompressError(CompressionError, ValueError):
    """No layer of the model matches what the step was asked to touch."""


class UnsupportedModelError(CompressionError, TypeError):
    """The step cannot work on this architecture; the message says what was looked for and what was found."""


class UnknownNameError(CompressionError, LookupError):
    """A registry has no entry of this name; the message suggests the nearest one."""


class DuplicateNameError(CompressionError, ValueError):
    """Two different classes were registered under one name."""


class PluginError(CompressionError, ImportError):
    """A plug-in of another distribution failed to load; raised only when that plug-in is asked for."""


class CheckpointError(CompressionError, ValueError):
    """A folder is not a readable checkpoint: damaged, incomplete, or written by a newer format."""


class BusyError(CheckpointError):
    """Another process is at work on the same stage or folder; call again when it has ended."""


class VerificationError(CompressionError, RuntimeError):
    """A step's own proof failed (for instance sliced logits differ from masked logits): the result is not returned."""


class GateError(CompressionError, RuntimeError):
    """A stage of a run failed a gate with `on_fail="stop"`; the message says which gate, and by how much.

    Attributes:
        report: the `Report` of the run so far, the failed stage last.
    """

    def __init__(self, message: str, report: Report | None = None) -> None:
        super().__init__(message)
        self.report = report


class ClaimError(CompressionError, AssertionError):
    """A comparison does not show what was claimed of it; the message has the numbers."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"` for the nearest of `known`, or an empty string.

    >>> did_you_mean("magnitude_prunning", ["gptq", "magnitude_pruning"])
    "; did you mean 'magnitude_pruning'?"
    >>> did_you_mean("zebra", ["gptq"])
    ''
    """
    near = get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
