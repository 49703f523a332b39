"""Work of a library that may never return, run so that it can really be stopped."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

_Value = TypeVar("_Value")
# How long a thread that was told to stop may take to do so.
_GRACE_SECONDS = 1.0


class _Stopped(BaseException):
    """Raised in the middle of the work; not an `Exception`, so that the work does not catch it."""


class _Work(threading.Thread, Generic[_Value]):
    def __init__(self, work: Callable[[], _Value]) -> None:
        super().__init__(daemon=True, name="llmcompress-time-limit")
        self._work = work
        self.result: list[_Value] = []
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result.append(self._work())
        except BaseException as error:  # handed to the caller, who raises it
            self.error = error


def within(seconds: float, work: Callable[[], _Value]) -> _Value:
    """Return what `work` returns, or raise `TimeoutError` once it has taken `seconds`.

    The work runs in a thread of its own, into which an exception is thrown at the limit: that ends any loop of Python
    code, on every system and from every thread of the caller. Should it be caught in a single call of compiled code,
    the thread is left behind; it does not keep the process from ending.

    Args:
        seconds: the limit, above 0.
        work: touches nothing that others use, since it may end anywhere.

    Raises:
        TimeoutError: at the limit.

    Example:
        >>> within(5, lambda: 1 + 1)
        2
        >>> import itertools
        >>> within(0.1, lambda: sum(itertools.repeat(0, 10**12)) if False else [None for _ in iter(int, 1)])
        Traceback (most recent call last):
        TimeoutError: no result within 0.1 s
    """
    thread = _Work(work)
    thread.start()
    try:
        thread.join(seconds)
    finally:
        # Also where the caller is interrupted while it waits.
        unfinished = thread.is_alive()
        if unfinished and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_Stopped))
            thread.join(_GRACE_SECONDS)
    if unfinished:
        raise TimeoutError(f"no result within {seconds:g} s")
    if thread.error is not None:
        raise thread.error
    return thread.result[0]
