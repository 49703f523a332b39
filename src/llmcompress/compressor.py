"""The one interface that every strategy has, and what the runner hands to it.

A strategy is a frozen pydantic model: its fields are its hyper-parameters, with ranges and descriptions, and it knows
how to be written to a recipe and read back. It returns a model and nothing else; bytes, zeros and seconds are measured
by the runner, never claimed by the strategy.
"""

from __future__ import annotations

import reprlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from .errors import ConfigError, did_you_mean
from .registry import compressors

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .data import Example

Need = Literal["data", "labels", "teacher", "tokenizer"]


class Action(BaseModel, frozen=True, extra="forbid"):
    """One line of a plan: a part of the model, what happens to it, or why it is left alone.

    Attributes:
        path: module or parameter path, as in `named_modules()`; `""` is the whole model.
        does: what is done (`"int8 per channel"`), or None where the part is left alone.
        reason: why it is left alone, or a remark on what is done.

    Example:
        >>> Action(path="lm_head", reason="tied to the embedding").touched
        False
    """

    path: str
    does: str | None = None
    reason: str | None = None

    @property
    def touched(self) -> bool:
        """Whether the part is changed."""
        return self.does is not None


@dataclass(frozen=True)
class Cut:
    """What a structural step kept of one axis, so that a later step can line teacher and student up.

    Attributes:
        path: the module whose axis was cut (an MLP, a ModuleList of blocks).
        axis: `"layers"`, `"ffn"`, `"heads"`, `"query_heads"`, `"experts"`, `"hidden"`, `"vocabulary"`.
        kept: indices kept, ascending, in the numbering before the cut.
        of: how many there were.
    """

    path: str
    axis: str
    kept: tuple[int, ...]
    of: int


def still_there(history: Sequence[Cut], axis: str) -> tuple[int, ...] | None:
    """Return which indices of the untouched model are left of an axis that runs through it all, or None if it is whole.

    Args:
        history: what earlier steps cut, in order.
        axis: `"hidden"` or `"vocabulary"`.

    Example:
        >>> first, second = Cut("wte", "vocabulary", (0, 5, 6), 9), Cut("wte", "vocabulary", (0, 2), 3)
        >>> still_there([first, second], "vocabulary")
        (0, 6)
    """
    left: tuple[int, ...] | None = None
    for cut in history:
        if cut.axis == axis:
            left = cut.kept if left is None else tuple(left[index] for index in cut.kept)
    return left


@dataclass(frozen=True)
class Context:
    """What a strategy may use beside the model.

    Attributes:
        data: training or calibration examples, or None.
        tokenizer: turns their texts into tokens, or None; see `replace_tokenizer`.
        teacher: the model as the caller passed it, before any step. Never change it.
        history: what earlier steps cut, in order; a structural step appends to it.
        seed: seeds everything random in the step.
        device: where the model is and stays.
        progress: whether progress bars are wanted.
        work_dir: folder where a step may keep what it has done so far, to go on with after a kill; it is removed when
            the step is finished. None where nothing is kept.
        told: findings of this step that no plan could foresee; see `tell`.
        corrected: paths of which `told` says something else than the plan.
    """

    data: Sequence[Example] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    teacher: PreTrainedModel | None = None
    history: list[Cut] = field(default_factory=list)
    seed: int = 0
    device: torch.device | str = "cpu"
    progress: bool = True
    work_dir: Path | None = None
    told: list[Action] = field(default_factory=list)
    corrected: set[str] = field(default_factory=set)

    def work_in(self, folder: Path | None) -> None:
        """Have the next step keep its unfinished work there; the runner says where."""
        object.__setattr__(self, "work_dir", folder)

    def replace_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Have all later steps, the scores and the result use this tokenizer: the one of a vocabulary that was cut."""
        object.__setattr__(self, "tokenizer", tokenizer)

    def tell(self, action: Action, *, instead: bool = False) -> None:
        """Put something found during the work into the report: a layer left after all, a remark, a warning.

        Args:
            action: what was found.
            instead: whether it takes the place of what the plan said of the same path.
        """
        self.told.append(action)
        if instead:
            self.corrected.add(action.path)

    def findings(self, planned: Iterable[Action]) -> list[Action]:
        """Return what a report says of the step: the plan where it held, and what was told.

        A remark on something that is told already goes into the same line.

        Example:
            >>> context = Context()
            >>> context.tell(Action(path="up", does="int4", reason="its zeros stay"))
            >>> [(action.path, action.reason) for action in context.findings([Action(path="up", does="int4")])]
            [('up', 'its zeros stay')]
        """
        lines: dict[object, Action] = {}
        for action in (*(one for one in planned if one.path not in self.corrected), *self.told):
            # What is said of the whole model is no part that could come twice.
            key = (action.path, action.does) if action.path else len(lines)
            known = lines.get(key)
            if known is not None:
                reasons = [known.reason, action.reason if action.reason != known.reason else None]
                action = known.model_copy(update={"reason": "; ".join(filter(None, reasons)) or None})
            lines[key] = action
        return list(lines.values())


@dataclass(frozen=True)
class Rounding:
    """How a quantization step will round one layer, for training that takes it into account.

    Attributes:
        path: the layer's module.
        parameter: the weight's name in it.
        input_axis: the axis of the weight that runs over the inputs; along the other axis outputs are independent.
        weight: takes the weight as the module holds it, returns what it will stand for after the step, float32.
        inputs: the same for the layer's inputs, float32, or None where they stay as they are.
    """

    path: str
    parameter: str
    input_axis: int
    weight: Callable[[torch.Tensor], torch.Tensor]
    inputs: Callable[[torch.Tensor], torch.Tensor] | None = None


@runtime_checkable
class Rounds(Protocol):
    """A step that tells how it will round each weight, so that a model can be trained for it.

    `KnowledgeDistillation(quantize_for=step)` takes any `Compressor` with this method.
    """

    def roundings(self, model: PreTrainedModel, context: Context | None = None) -> list[Rounding]:
        """Return one entry a layer that the step would quantize in `model`.

        Args:
            model: as the training begins with it.
            context: its data may be looked at for ranges of activations; None for a plan, which knows none yet.
        """


@dataclass(frozen=True)
class Outline:
    """What a step leaves of a model without weights, and what the work on the real one takes.

    Attributes:
        model: with the sizes that it will have, on the meta device; the one that came in, changed in place, or another.
        estimated: why the real sizes may be others, or None where these are exact.
        scratch: bytes that the work takes at most beside the untouched original and the model it works on.
        flops: of all its matrix products, a multiplication and an addition being two.
        swept: how many numbers are read or written one by one elsewhere.
        overlap: why there may be more zeros than noted, though all sizes are exact; or None.
    """

    model: PreTrainedModel
    estimated: str | None = None
    scratch: int = 0
    flops: float = 0.0
    swept: float = 0.0
    overlap: str | None = None


def _leaves(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation is made of: int and str of `dict[str, int | None]`, for instance."""
    parts = get_args(annotation)
    return set().union(*map(_leaves, parts)) if parts else {annotation}


class Settings(BaseModel):
    """Base of hyper-parameters: immutable, comparable, written to and read from plain dicts.

    Raises:
        ConfigError: on construction, where a field is out of range, unknown, or contradicts another one.

    Example:
        >>> class Dropout(Settings):
        ...     share: float = 0.1
        >>> Dropout(rate=0.2)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: Dropout has no field 'rate'. Fields: share.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, fields: Any) -> Any:
        # pydantic takes True for 1, where a recipe says `steps: true` or `yes` by mistake.
        for name, value in fields.items() if isinstance(fields, dict) else ():
            field = cls.model_fields.get(name)
            if field is None or bool in _leaves(field.annotation):
                continue
            held = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(one, bool) for one in held) and {int, float} & _leaves(field.annotation):
                what = "a number" if isinstance(value, bool) else "of numbers"
                raise ConfigError(f"{cls.__name__}.{name} must be {what}, got {value}.")
        return fields

    def __init__(self, /, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            raise ConfigError(_explain(type(self), error), location=_location(error)) from None

    def __str__(self) -> str:
        changed = {key: value for key, value in self if value != type(self).model_fields[key].get_default()}
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in changed.items())})"


class Compressor(Settings, ABC):
    """Base of all strategies.

    A subclass declares its hyper-parameters as pydantic fields and implements `compress`. Instances are immutable,
    comparable, and written to and read from plain dicts and YAML.

    Raises:
        ConfigError: on construction, where a field is out of range, unknown, or contradicts another one.

    Example:
        >>> import llmcompress as lc
        >>> lc.MagnitudePruning(sparsity=1.5)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: MagnitudePruning.sparsity must be in (0, 1), got 1.5.
    """

    @property
    def needs(self) -> frozenset[Need]:
        """What the step cannot run without; asked before the first step of a pipeline runs."""
        return frozenset()

    @property
    def terminal(self) -> bool:
        """Whether no weight-changing step may follow, as after quantization."""
        return False

    @property
    def begins(self) -> bool:
        """Whether the step takes another model in place of the one it is given, so that nothing may come before it."""
        return False

    @property
    def reads(self) -> tuple[str, ...]:
        """Files and folders that the fields name: a run that goes on must find in them what it found before."""
        return ()

    @property
    def in_turns(self) -> bool:
        """Whether `compress` changes one block at a time, each in its own turn; then `compress_checkpoint` can run it.

        The turns are those of `anatomy.turns.in_turns` or `calibration.block_by_block`. Before its turn a block is only
        read, and afterwards it is left alone; what is in no block may be changed in the turn `""` and behind it.
        """
        return False

    @abstractmethod
    def compress(self, model: PreTrainedModel, context: Context) -> PreTrainedModel:
        """Compress `model` and return it; it may be changed in place, the runner made the copy."""

    def plan(self, model: PreTrainedModel, context: Context) -> list[Action]:
        """Tell what `compress` would touch, and why it leaves the rest. Changes nothing."""
        return [Action(path="", does=type(self).__name__)]

    def outline(self, model: PreTrainedModel, context: Context) -> Outline | None:
        """Do to the sizes of `model`, which has no weights, what `compress` does; None where that is not foretold.

        What `compress` tells `context` of cuts and tokenizers is told here too, for the steps that follow.

        Args:
            model: on the meta device; it may be changed in place.
            context: as for `compress`; its `device` is where the work will be done.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return `{"name": registry name, **fields}`, which `lc.compressors.create` turns back into an equal step."""
        return {"name": compressors.name_of(type(self)), **self.model_dump(mode="json")}


def _location(error: ValidationError) -> tuple[str | int, ...]:
    """Return where the first finding is, down to what a field's own validation found."""
    finding = error.errors(include_url=False)[0]
    cause = finding.get("ctx", {}).get("error")
    return (*finding["loc"], *(cause.location if isinstance(cause, ConfigError) else ()))


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    """Turn pydantic's findings into lines of the house's form: who.what must be X, got Y."""
    return " ".join(_explain_one(cls, dict(finding)) for finding in error.errors(include_url=False))


def _explain_one(cls: type[BaseModel], finding: dict[str, Any]) -> str:
    location: tuple[Any, ...] = finding["loc"]
    name = str(location[0]) if location else ""
    where = f"{cls.__name__}.{name}" if name else cls.__name__
    got = reprlib.repr(finding.get("input"))
    kind = finding["type"]
    if kind == "extra_forbidden":
        hint = did_you_mean(name, cls.model_fields) or "."
        return f"{cls.__name__} has no field {name!r}{hint} Fields: {', '.join(cls.model_fields) or 'none'}."
    if kind == "missing":
        return f"{where} must be given: {cls.model_fields[name].description or 'it has no default'}"
    if kind in {"value_error", "assertion_error"}:
        detail = str(finding["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
        return detail if detail.startswith(cls.__name__) else f"{where}: {detail}"
    interval = _interval(cls.model_fields[name].metadata) if name in cls.model_fields else None
    if interval and kind in {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}:
        return f"{where} must be in {interval}, got {got}."
    if kind == "literal_error":
        return f"{where} must be {finding['ctx']['expected']}, got {got}."
    message = str(finding["msg"])
    message = message.removeprefix("Input should be ").removeprefix("Value should be ")
    return f"{where} must be {message[:1].lower()}{message[1:]}, got {got}."


def _interval(metadata: Iterable[Any]) -> str | None:
    """Write pydantic's bounds as an interval, `(0, 1)` or `[1, inf)`; None where there are none."""
    low, high, left, right = "-inf", "inf", "(", ")"
    for bound in metadata:
        for attribute, value in vars(bound).items() if hasattr(bound, "__dict__") else _slots(bound):
            if attribute in {"gt", "ge"}:
                low, left = f"{value:g}", "(" if attribute == "gt" else "["
            elif attribute in {"lt", "le"}:
                high, right = f"{value:g}", ")" if attribute == "lt" else "]"
    return None if (low, high) == ("-inf", "inf") else f"{left}{low}, {high}{right}"


def _slots(bound: Any) -> Iterable[tuple[str, Any]]:
    return [(name, getattr(bound, name)) for name in ("gt", "ge", "lt", "le") if hasattr(bound, name)]
