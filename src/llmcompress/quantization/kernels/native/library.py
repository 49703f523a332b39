"""Loads the native library, picks an instruction set, and lends it the threads of torch."""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from ....errors import ConfigError

SETS = ("avx512_amx", "avx512_vnni", "avx_vnni", "avx2", "neon_dot", "portable")
"""The instruction sets there are kernels for, the fastest first."""

VARIABLE = "LLMCOMPRESS_NATIVE"
"""Names a set in the environment, to be taken instead of the fastest, or is `off`."""

_BUILD = "python -m llmcompress.quantization.kernels.native.build"

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64
# Result and arguments of what the library exports; a table of kernels comes first where one is taken.
_PROTOTYPES = {
    "llmc_sources": (ctypes.c_char_p, []),
    "llmc_table": (_POINTER, [ctypes.c_char_p]),
    "llmc_use_openmp": (None, [_POINTER]),
    "llmc_byte_limit": (_SIZE, [_POINTER]),
    "llmc_multiply_packed": (
        ctypes.c_int32,
        [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, ctypes.c_bool, _SIZE],
    ),
    "llmc_activate": (None, [_POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE]),
    "llmc_rms_norm": (
        None,
        [*[_POINTER] * 3, ctypes.c_float, _SIZE, _SIZE, ctypes.c_float, _POINTER, _SIZE],
    ),
    "llmc_layer_norm": (None, [*[_POINTER] * 4, _SIZE, _SIZE, ctypes.c_float, _POINTER, _SIZE]),
    "llmc_run_chain": (
        ctypes.c_int32,
        [_POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, _SIZE],
    ),
    "llmc_code_rows": (None, [_POINTER, _POINTER, _SIZE, _SIZE, _SIZE, _POINTER, _POINTER, _SIZE]),
    "llmc_int8_pack": (_POINTER, [*[_POINTER] * 4, _SIZE, _SIZE, _SIZE]),
    "llmc_int8_free": (None, [_POINTER]),
    "llmc_int8_bytes": (_SIZE, [_POINTER]),
    "llmc_int8_linear": (
        ctypes.c_int32,
        [_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _SIZE, _SIZE, _SIZE, ctypes.c_float, _SIZE],
    ),
}


class NotBuilt(RuntimeError):  # noqa: N818
    """There is no native library, or not for this processor."""


@dataclass(frozen=True)
class Native:
    """The kernels of one instruction set.

    Attributes:
        functions: the library; its functions release the interpreter lock.
        table: the address of the kernels, the first argument of those functions.
        name: of the set.
        parallel: whether loops share torch's threads; else they run on one.
    """

    functions: ctypes.CDLL
    table: int
    name: str
    parallel: bool


@cache
def native() -> Native | None:
    """Return the kernels for this process, or None where there are none; `why_absent` tells why.

    Raises:
        ConfigError: the environment names a set that does not exist or that this machine lacks.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return None
    if wanted and wanted not in SETS:
        raise ConfigError(f"{VARIABLE} must be one of {', '.join(SETS)} or 'off', got {wanted!r}.")
    try:
        return load(wanted or None)
    except NotBuilt as error:
        if wanted:
            raise ConfigError(f"{VARIABLE} must name kernels that this machine has, got {wanted!r}: {error}") from error
        return None


def why_absent() -> str:
    """Return what `native` would need, where it returns None."""
    if os.environ.get(VARIABLE) == "off":
        return f"{VARIABLE} other than 'off'"
    try:
        _library()
    except NotBuilt as error:
        return str(error)
    return "nothing"


def load(name: str | None = None) -> Native:
    """Return the kernels of one set; None takes the fastest that this processor has.

    Raises:
        NotBuilt: there is no library, or not with this set.

    Example:
        >>> try:
        ...     name = load("portable").name
        ... except NotBuilt:
        ...     name = "portable"
        >>> name
        'portable'
    """
    library, parallel = _library()
    for candidate in SETS if name is None else (name,):
        table = library.llmc_table(candidate.encode())
        if table:
            return Native(library, table, candidate, parallel)
    raise NotBuilt(f"a processor and a compiler with {name}")


@cache
def _library() -> tuple[ctypes.CDLL, bool]:
    """Return the library and whether it has torch's threads."""
    # Not above: `python -m` runs this module, which must not be imported yet.
    from .build import LIBRARY, sources_hash

    if not LIBRARY.exists():
        raise NotBuilt(f"a C++ compiler at installation, or `{_BUILD}`")
    try:
        library = ctypes.CDLL(str(LIBRARY))
        _declare(library, "llmc_sources")
        stale = library.llmc_sources() != sources_hash().encode()
    except (OSError, AttributeError) as error:
        raise NotBuilt(f"a library for this machine ({error}): `{_BUILD}`") from error
    if stale:
        warnings.warn(f"The native kernels were built of other sources and are not used; run `{_BUILD}`.", stacklevel=2)
        raise NotBuilt(f"a library built of the sources beside it: `{_BUILD}`")
    for function in _PROTOTYPES:
        _declare(library, function)
    parallel = _openmp()
    library.llmc_use_openmp(parallel)
    return library, parallel is not None


def _declare(library: ctypes.CDLL, function: str) -> None:
    found = getattr(library, function)
    found.restype, found.argtypes = _PROTOTYPES[function]


def _openmp() -> int | None:
    """Return the address of `GOMP_parallel` in the very OpenMP runtime that torch uses.

    A second runtime would have threads of its own, which take the cores from torch's. A symbol is looked up in a
    library and in those that it needs, so torch's own library leads to its runtime, whatever its name and place.
    """
    folder = Path(torch.__file__).parent / "lib"
    for name in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        if (folder / name).exists():
            try:
                return ctypes.cast(ctypes.CDLL(str(folder / name)).GOMP_parallel, ctypes.c_void_p).value
            except (OSError, AttributeError):
                return None
    return None
