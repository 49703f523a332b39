"""Names to classes: the compressors, the tasks, the gates, the importances (functions), and whatever plug-ins add.

A registry knows three sources and reads each only when a name is asked for: the classes registered by decorator, the
library's own packages (imported on first use, since they import torch), and the entry points of other distributions
(loaded one by one, by name; a broken one never breaks an import, nor the others).
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from .errors import ConfigError, DuplicateNameError, PluginError, UnknownNameError, did_you_mean

T = TypeVar("T")
C = TypeVar("C", bound=Callable[..., Any])


class Registry(Generic[T]):
    """A mapping from snake_case names to classes or functions, with suggestions, plug-ins, creation from a plain dict.

    Args:
        kind: what an entry is, for messages: `"compressor"`, `"task"`.
        group: entry-point group whose plug-ins belong here, or None.
        packages: packages of the library whose modules register entries; imported on first use.

    Example:
        >>> shapes = Registry("shape")
        >>> @shapes.register("round_one")
        ... class Round:
        ...     def __init__(self, radius=1): self.radius = radius
        >>> shapes.list()
        ['round_one']
        >>> shapes.create({"name": "round_one", "radius": 3}).radius
        3
        >>> shapes.get("round_on")
        Traceback (most recent call last):
        llmcompress.errors.UnknownNameError: no shape is called 'round_on'; did you mean 'round_one'? Known: round_one.
    """

    def __init__(self, kind: str, *, group: str | None = None, packages: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.group = group
        self._packages = packages
        self._classes: dict[str, Any] = {}
        self._plugins: dict[str, EntryPoint] | None = None

    def register(self, name: str) -> Callable[[C], C]:
        """Return a class decorator that enters the class under `name`.

        The same class may be entered again (a notebook cell that is run twice); another class under a taken name is
        refused.

        Raises:
            ConfigError: `name` is not snake_case.
            DuplicateNameError: `name` belongs to another class.
        """
        if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ConfigError(f"the name of a {self.kind} must be snake_case ([a-z][a-z0-9_]*), got {name!r}.")

        def enter(cls: C) -> C:
            known = self._classes.get(name)
            if known is not None and _identity(known) != _identity(cls):
                raise DuplicateNameError(
                    f"{self.kind} {name!r} is already {_identity(known)}; give {_identity(cls)} another name."
                )
            self._classes[name] = cls
            return cls

        return enter

    def list(self) -> list[str]:
        """Return all names, sorted: registered, built in, and plug-ins (named without being loaded)."""
        self._import_packages()
        return sorted({*self._classes, *self._entry_points()})

    def get(self, name: str) -> Any:
        """Return the class called `name`.

        Raises:
            UnknownNameError: no such name; suggests the nearest.
            PluginError: the name is a plug-in's and the plug-in fails to load.
        """
        if name not in self._classes:
            self._import_packages()
        if name not in self._classes and name in self._entry_points():
            self._load(self._entry_points()[name])
        if name not in self._classes:
            known = self.list()
            hint = did_you_mean(str(name), known) or "."
            raise UnknownNameError(f"no {self.kind} is called {name!r}{hint} Known: {', '.join(known)}.")
        return self._classes[name]

    def create(self, spec: str | Mapping[str, Any]) -> T:
        """Build an instance from a name or from `{"name": ..., **fields}`.

        Raises:
            ConfigError: `spec` is neither, or has no name.
            UnknownNameError: as `get`.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
            raise ConfigError(
                f"a {self.kind} must be a name or a dict with the key 'name', got {spec!r}; "
                f"for instance {{'name': {next(iter(self.list()), '...')!r}}}."
            )
        fields = {key: value for key, value in spec.items() if key != "name"}
        return self.get(spec["name"])(**fields)

    def name_of(self, cls: type) -> str:
        """Return the name under which `cls` is registered.

        Raises:
            UnknownNameError: it is not.
        """
        for name, known in self._classes.items():
            if known is cls or _identity(known) == _identity(cls):
                return name
        raise UnknownNameError(f"{_identity(cls)} is not a registered {self.kind}; decorate it with @register(name).")

    def __iter__(self) -> Iterator[str]:
        return iter(self.list())

    def __len__(self) -> int:
        return len(self.list())

    def __contains__(self, name: object) -> bool:
        return name in self.list()

    def __repr__(self) -> str:
        return f"<{len(self)} {self.kind}s: {', '.join(self)}>"

    def _import_packages(self) -> None:
        packages, self._packages = self._packages, ()
        for package in packages:
            module = importlib.import_module(package)
            for info in pkgutil.iter_modules(getattr(module, "__path__", [])):
                importlib.import_module(f"{package}.{info.name}")

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._plugins is None:
            self._plugins = {point.name: point for point in entry_points(group=self.group)} if self.group else {}
        return self._plugins

    def _load(self, point: EntryPoint) -> None:
        try:
            loaded = point.load()
        except Exception as error:
            source = f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed distribution"
            raise PluginError(
                f"{self.kind} {point.name!r} of {source} ({point.value}) failed to load: "
                f"{type(error).__name__}: {error}; repair or uninstall that distribution."
            ) from error
        # A module as entry point registers by decorator while it is imported; a class or function is entered here.
        if callable(loaded):
            self.register(point.name)(loaded)


def _identity(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


compressors: Registry[Any] = Registry(
    "compressor",
    group="llmcompress.compressors",
    packages=("llmcompress.pruning", "llmcompress.quantization", "llmcompress.distillation", "llmcompress.pipeline"),
)
"""All compression strategies; `lc.compressors.list()`, `.get(name)`, `.create({"name": ..., **fields})`."""

tasks: Registry[Any] = Registry("task", group="llmcompress.tasks", packages=("llmcompress.evaluation.tasks",))
"""All evaluation tasks."""

importances: Registry[Any] = Registry(
    "importance", group="llmcompress.importances", packages=("llmcompress.pruning.channel_criteria",)
)
"""All importances of structured pruning; add one with `lc.register_importance`."""

gates: Registry[Any] = Registry("gate", packages=("llmcompress.gates",))
"""All gates of `compress`."""


def register(name: str) -> Callable[[C], C]:
    """Enter a `Compressor` subclass in the registry under `name`: the whole act of adding a strategy.

    Example:
        >>> import llmcompress as lc
        >>> @lc.register("leave_alone")
        ... class LeaveAlone(lc.Compressor):
        ...     def compress(self, model, context):
        ...         return model
        >>> "leave_alone" in lc.compressors
        True
    """
    return compressors.register(name)
