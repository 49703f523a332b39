"""Builds the native kernels: `python -m llmcompress.quantization.kernels.native.build`, and the wheel's build hook.

Each instruction set is a translation unit with flags of its own; a compiler that does not know one leaves it out. The
library lies beside its sources and knows what it was built of. Imports nothing of the package: the hook loads it alone.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
LIBRARY = FOLDER / ("llmcompress_native.dll" if sys.platform == "win32" else "llmcompress_native.so")

_Flags = dict[str, tuple[list[str], list[str]]]
# GCC 12 takes the undefined registers of its own headers for a mistake.
_NO_WARNING = ["-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
_AVX512 = [f"-m{part}" for part in ("avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c", "bmi2")]
# By machine, the flags of each set that is no part of its baseline: as GCC and Clang write them, and as MSVC does.
_X86: _Flags = {
    "avx2": (["-mavx2", "-mfma", "-mf16c", "-mbmi2"], ["/arch:AVX2"]),
    "avx_vnni": (["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mavxvnni"], ["/arch:AVX2"]),
    "avx512_vnni": ([*_AVX512, *_NO_WARNING], ["/arch:AVX512"]),
    "avx512_amx": (
        [*_AVX512, "-mamx-tile", "-mamx-int8", "-mamx-bf16", "-mavx512bf16", "-mavx512vbmi", *_NO_WARNING],
        ["/arch:AVX512"],
    ),
}
_ARM: _Flags = {"neon_dot": (["-march=armv8.2-a+dotprod"], [])}
_SETS = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}
_PORTABLE = ("portable", "cpu", "parallel", "int8_weight", "chain", "kept")
# Without the debug information that Python's own flags ask for: it makes the library ten times as large.
_COMMON = (
    ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"],
    ["/std:c++17", "/O2"],
)
# The portable set is there to be measured against, and is worth no minute of a compiler.
_LESS: tuple[list[str], list[str]] = (["-O2"], [])
# Python's own flags give overflow a meaning, which would hide it from the sanitizer.
_SANITIZE = [
    *("-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=undefined"),
    *("-fno-wrapv", "-fno-omit-frame-pointer", "-g", "-O1"),
]


def sources_hash() -> str:
    """Return what tells one state of the sources, and of how they are compiled, from another."""
    found = hashlib.sha256()
    for path in sorted([*FOLDER.glob("*.cpp"), *FOLDER.glob("*.hpp"), Path(__file__)]):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:16]


def build(*, sanitize: bool = False, quiet: bool = False) -> Path:
    """Compile and link the library.

    Args:
        sanitize: with the address and undefined-behaviour sanitizers, and without optimization.
        quiet: whether to keep to oneself which sets are left out.

    Returns:
        The library.

    Raises:
        RuntimeError: there is no compiler, or it fails; or the machine keeps numbers in another order than codes.
    """
    if sys.byteorder != "little":
        raise RuntimeError("the native kernels read codes in words whose lowest byte is the first one")
    try:
        compiler, errors = _compiler()
    except ImportError as error:
        raise RuntimeError("the native kernels need setuptools, which knows the compilers; install it") from error
    kind = compiler.compiler_type == "msvc"
    sanitizers = _SANITIZE if sanitize else []
    with tempfile.TemporaryDirectory() as folder:

        def compiled(name: str, flags: Sequence[str] = ()) -> str:
            all_flags = [*_COMMON[kind], *flags, *sanitizers]
            made = compiler.compile([str(FOLDER / f"{name}.cpp")], output_dir=folder, extra_postargs=all_flags)
            return str(made[0])

        try:
            # Each compilation is a process of its own, and takes seconds: as many at a time as there are processors.
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                sets = {
                    name: pool.submit(compiled, name, flags[kind])
                    for name, flags in _SETS.get(platform.machine(), {}).items()
                }
                objects, known = list(pool.map(lambda name: compiled(name, _LESS[kind]), _PORTABLE)), []
            for name, one in sets.items():
                try:
                    objects.append(one.result())
                    known.append(f"-DLLMC_{name.upper()}=1")
                except errors as error:
                    if not quiet:
                        print(f"llmcompress: without {name}: {error}", file=sys.stderr)  # noqa: T201
            objects.append(compiled("library", [*known, f'-DLLMC_SOURCES="{sources_hash()}"']))
            # Made beside and moved: a process that has the old library open keeps it.
            made = Path(folder) / LIBRARY.name
            compiler.link_shared_object(objects, str(made), target_lang="c++", extra_postargs=sanitizers[:1])
            os.replace(_moved(made), LIBRARY)
        except errors as error:
            raise RuntimeError(f"the native kernels did not compile: {error}") from error
    return LIBRARY


def _moved(made: Path) -> Path:
    """Bring a file to the file system of the sources, under a name that nobody reads."""
    beside = LIBRARY.with_suffix(f".{os.getpid()}")
    beside.write_bytes(made.read_bytes())
    return beside


def _compiler() -> tuple[Any, tuple[type[Exception], ...]]:
    """Return setuptools' compiler of this machine, and what it raises."""
    import setuptools  # noqa: F401, I001  (first: it brings distutils)
    from distutils.ccompiler import new_compiler
    from distutils.errors import CCompilerError, DistutilsError
    from distutils.sysconfig import customize_compiler

    if sys.platform == "darwin":
        # Python may be built for two machines at once; the flags of an instruction set are for one.
        os.environ.setdefault("ARCHFLAGS", f"-arch {platform.machine()}")
    compiler = new_compiler()
    customize_compiler(compiler)
    return compiler, (CCompilerError, DistutilsError, OSError)


def main() -> None:
    """Build at the command line."""
    parser = argparse.ArgumentParser(description="Build the native kernels beside their sources.")
    parser.add_argument("--sanitize", action="store_true", help="with the address and undefined-behaviour sanitizers")
    print(build(sanitize=parser.parse_args().sanitize))  # noqa: T201


if __name__ == "__main__":
    main()
