"""A labelled data set that every machine with llmcompress already has: docstrings, and the package they come from.

The files of the installed packages are read by `ast`, never imported. The names of the packages are masked, all
docstrings of one file stand on one side of the split, and a docstring that nearly repeats an earlier one is left out.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

from ..data import Example
from ..errors import ConfigError, MissingInputError

PACKAGES = ("matplotlib", "networkx", "pandas", "python", "sympy", "torch", "transformers")
"""The classes; `python` is the standard library, the others come with `llmcompress[demo]`."""

MASK = "_"
"""Stands where the name of a package stood."""

_GIVE_AWAYS = (*PACKAGES, "numpy", "scipy", "hugging", "pydata", "pyarrow", "pyplot")
_ALIASES = ("np", "pd", "nx", "plt", "mpl", "sp", "sy", "hf")
_NAME = re.compile(rf"{'|'.join(_GIVE_AWAYS)}|\b(?:{'|'.join(_ALIASES)})\b", re.IGNORECASE)
# The whole dotted path, role or word that holds a name: "torch.nn", "~numpy.ndarray", "PyTorch", "isympy", "np.nan".
_NAMED = re.compile(rf"[\w.~@/-]*(?:{_NAME.pattern})[\w.@/-]*", re.IGNORECASE)
_DROPPED_LINE = re.compile(r"\s*(>>>|\.\.\.|\.\. )")
_SKIPPED_FOLDERS = frozenset(
    {"tests", "test", "testing", "_vendor", "vendor", "externals", "site-packages", "benchmarks", "idlelib", "lib2to3"}
)
_FEWEST_WORDS, _MOST_CHARACTERS = 25, 320
_MOST_OF_A_MODULE = 24
_SHINGLE_WORDS, _NEAR = 3, 0.4


@dataclass(frozen=True)
class DocstringData:
    """Docstrings labelled with the name of their package, as many of each package.

    Attributes:
        train: examples to fine-tune with.
        test: examples of other modules than those of `train`.
        unlabelled: texts of yet other modules, without labels, to distil with; fewer where a package has no more.
        modules: for each side, the files that its examples come from, as `package/path/in/it.py`.
    """

    train: list[Example]
    test: list[Example]
    unlabelled: list[Example]
    modules: dict[str, frozenset[str]]


def docstring_data(*, train: int = 300, test: int = 120, unlabelled: int = 0, seed: int = 0) -> DocstringData:
    """Collect docstrings of each of `PACKAGES`, the same ones for the same seed and versions.

    Args:
        train: examples of each class to train with, at least 1.
        test: examples of each class to test with, at least 1.
        unlabelled: texts of each class to distil with, as far as there are so many.
        seed: shuffles the modules, and with them the split.

    Raises:
        ConfigError: a number is below 1, or larger than a package has docstrings.
        MissingInputError: a package is not installed.

    Example:
        >>> data = docstring_data(train=2, test=1)
        >>> len(data.train), len(data.test), data.test[0].label
        (14, 7, 'matplotlib')
    """
    wanted = {"test": test, "train": train, "unlabelled": unlabelled}
    for side, count in wanted.items():
        least = 0 if side == "unlabelled" else 1
        if count < least:
            raise ConfigError(f"{side} examples a class must be at least {least}, got {count}.")
    sources = {package: _docstrings(package, seed) for package in PACKAGES}
    kept = _Distinct()
    sides: dict[str, list[Example]] = {}
    modules: dict[str, frozenset[str]] = {}
    for side, count in wanted.items():
        taken = [_take(sources[package], count, kept) for package in PACKAGES]
        short = [
            f"{package} has {len(rows)}" for package, rows in zip(PACKAGES, taken, strict=True) if len(rows) < count
        ]
        if short and side != "unlabelled":
            raise ConfigError(
                f"{side} examples a class must be at most what is there, got {count}; {', '.join(short)}."
            )
        sides[side] = [
            Example(text, label=package if side != "unlabelled" else None)
            for package, rows in zip(PACKAGES, taken, strict=True)
            for _, text in rows[:count]
        ]
        modules[side] = frozenset(module for rows in taken for module, _ in rows[:count])
    return DocstringData(**sides, modules=modules)


def masked(docstring: str, own: str = "") -> str:
    """Return the start of a docstring on one line, package names masked, code examples and directives left out.

    Args:
        docstring: as it stands in the source.
        own: the file that it stands in; dotted paths that begin with a part of it are masked too.

    Example:
        >>> masked("Like :class:`~torch.nn.Linear`, on NumPy arrays.\\n\\n>>> import numpy as np")
        'Like :class:`_`, on _ arrays.'
        >>> masked("Raises smtplib.SMTPException.", "python/smtplib.py")
        'Raises _.'
    """
    start = inspect.cleandoc(docstring)[: 4 * _MOST_CHARACTERS]
    prose = " ".join(line for line in start.splitlines() if not _DROPPED_LINE.match(line))
    parts = [re.escape(part) for part in Path(own.removesuffix(".py")).parts]
    if parts:
        prose = re.sub(rf"\b(?:{'|'.join(parts)})\.\w[\w.]*(?<!\.)", MASK, prose)
    text = " ".join(_NAMED.sub(MASK, word) if _NAME.search(word) else word for word in prose.split())
    return text if len(text) <= _MOST_CHARACTERS else text[:_MOST_CHARACTERS].rsplit(" ", 1)[0]


def _take(source: Iterator[tuple[str, list[str]]], count: int, kept: _Distinct) -> list[tuple[str, str]]:
    """Draw whole modules until there are `count` docstrings; the last module's surplus goes to neither side."""
    rows: list[tuple[str, str]] = []
    while len(rows) < count and (drawn := next(source, None)) is not None:
        module, texts = drawn
        rows.extend((module, text) for text in texts if kept.add(text))
    return rows


def _docstrings(package: str, seed: int) -> Iterator[tuple[str, list[str]]]:
    """Yield the modules of a package in shuffled order, each with its usable docstrings."""
    root = _folder(package)
    paths = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(root).parts)]
    names = {f"{package}/{path.relative_to(root).as_posix()}": path for path in paths}
    for name in sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest()):
        texts = (masked(docstring, name) for docstring in _read(names[name]))
        yield name, list(islice((text for text in texts if len(text.split()) >= _FEWEST_WORDS), _MOST_OF_A_MODULE))


def _folder(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_path("stdlib"))
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingInputError(
            f"the demo reads the docstrings of {package}, which is not installed; pip install {package}."
        )
    return Path(spec.submodule_search_locations[0])


def _read(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # the standard library ships files that are wrong on purpose
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield docstring
        # Definitions stand in statements only; going into expressions would take most of the time.
        waiting.extend(child for child in getattr(node, "body", []) if isinstance(child, ast.stmt))


class _Distinct:
    """Accepts a text unless it shares too many runs of words with one that it accepted before."""

    def __init__(self) -> None:
        self._holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._sizes: list[int] = []

    def add(self, text: str) -> bool:
        words = re.findall(r"\w+", text.lower())
        shingles = {tuple(words[i : i + _SHINGLE_WORDS]) for i in range(len(words) - _SHINGLE_WORDS + 1)}
        shared: dict[int, int] = defaultdict(int)
        for shingle in shingles:
            for holder in self._holders.get(shingle, ()):
                shared[holder] += 1
        if not shingles or any(n > _NEAR * min(len(shingles), self._sizes[i]) for i, n in shared.items()):
            return False
        for shingle in shingles:
            self._holders[shingle].append(len(self._sizes))
        self._sizes.append(len(shingles))
        return True
