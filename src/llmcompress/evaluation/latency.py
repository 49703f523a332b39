"""How long one forward pass takes: alone, or several models taking turns so that the machine's drift cancels."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from ..anatomy.probe import probe_inputs
from ..data import longest_input
from ..errors import ConfigError, MissingInputError
from .energy import Energy, find_counters, measure_energy
from .inference import evaluating, threads_set_to
from .tasks.task import check_positive
from .turns import Ratio, check_seconds, ratio_of, take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUICK_MS = 50.0
"""Where a pass is so quick, a turn first lets the model find its weights in the caches that others have just used."""

_PASSES_A_TURN = 3
# Energy is measured for so long at most, a model.
_ENERGY_SECONDS = 1.0


class Latency(BaseModel, frozen=True, extra="forbid"):
    """Time of one forward pass over a batch, all tokens at once (for a language model: the prefill)."""

    batch_size: int = Field(description="rows of a batch")
    tokens: int = Field(description="tokens a row")
    median_ms: float = Field(description="median over all passes, in milliseconds")
    mean_ms: float
    p90_ms: float = Field(description="nine passes of ten are at most so long")
    p99_ms: float
    tokens_per_second: float = Field(description="batch_size * tokens over the median")
    repeats: int = Field(description="timed passes")
    warmup: int = Field(description="passes before them")
    threads: int = Field(description="intra-op threads of torch")
    interop_threads: int | None = Field(default=None, description="inter-op threads of torch; None if not recorded")
    dtype: str = Field(description="dtype of most floating-point weights; what a quantized layer computes in")
    device: str
    turns_ms: tuple[float, ...] = Field(description="median of each turn, in order; two turns make a round")
    energy: Energy | None = Field(default=None, description="of a pass; None where no counter can be read")


class Speedup(Ratio, frozen=True, extra="forbid"):
    """How many times faster than the base the forward pass is; `tokens` is 0 where it read images."""

    batch_size: int
    tokens: int


def measure_latency(
    model: PreTrainedModel,
    *,
    batch_size: int = 1,
    tokens: int = 128,
    warmup: int = 3,
    seconds: float = 2.0,
    threads: int | None = None,
) -> Latency:
    """Time the forward pass of `model` on random tokens.

    Args:
        model: any text model; its mode is given back.
        batch_size: rows a batch, at least 1.
        tokens: tokens a row, at most what the model can take.
        warmup: passes before the first timed one.
        seconds: how long to measure, at least six rounds whatever it says.
        threads: intra-op threads of torch while it measures; None leaves them.

    Raises:
        ConfigError: a number is out of range, or the model cannot take so many tokens.

    Example:
        >>> import llmcompress.testing as lt
        >>> found = measure_latency(lt.tiny_model("bert"), tokens=8, seconds=0.01)
        >>> found.median_ms <= found.p90_ms <= found.p99_ms
        True
    """
    models = {"model": model}
    return measure_latencies(
        models, batch_size=batch_size, tokens=tokens, warmup=warmup, seconds=seconds, threads=threads, progress=False
    )["model"]


def measure_latencies(
    models: Mapping[str, PreTrainedModel],
    *,
    batch_size: int = 1,
    tokens: int = 128,
    warmup: int = 3,
    seconds: float = 2.0,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Latency]:
    """Time several models in turns: a round goes through them in a drawn order and back again (ABBA or BAAB).

    A clock that slows down, or a neighbour that wakes up, so hits all of them alike, and `speedup` compares turns of
    the same round. Where the hardware counts energy, up to another second a model goes into that. Arguments as
    `measure_latency`; `seconds` is for each model.

    Raises:
        MissingInputError: there is no model.
        ConfigError: as `measure_latency`.
    """
    if not models:
        raise MissingInputError("measure_latencies.models is empty; pass at least one model.")
    check_positive("batch_size", batch_size, optional=False)
    check_positive("tokens", tokens, optional=False)
    check_positive("warmup", warmup, least=0, optional=False)
    check_positive("threads", threads)
    check_seconds(seconds)
    for model in models.values():
        most = longest_input(model)
        if most is not None and tokens > most:
            raise ConfigError(f"tokens must be at most {most} for {type(model).__name__}, got {tokens}.")
    inputs = {name: forward_inputs(model, batch_size, tokens) for name, model in models.items()}
    passes: dict[str, list[float]] = {name: [] for name in models}
    turns: dict[str, list[float]] = {name: [] for name in models}
    counters = {name: find_counters(model.device) for name, model in models.items()}

    with ExitStack() as stack:
        in_force = stack.enter_context(threads_set_to(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        first = [_timed_pass(model, inputs[name]) for name, model in models.items() for _ in range(warmup)]
        # Slow passes notice no caches: one makes the turn. The rule is one for all of them, since a median of three
        # passes and a single one are not alike.
        quick = not first or min(first) < QUICK_MS

        def take_turn(name: str) -> None:
            if quick:
                _timed_pass(models[name], inputs[name])
            times = [_timed_pass(models[name], inputs[name]) for _ in range(_PASSES_A_TURN if quick else 1)]
            passes[name] += times
            turns[name].append(statistics.median(times))

        title = f"latency {batch_size}x{tokens}"
        take_turns(take_turn, list(models), seconds=seconds, title=title, progress=progress)
        energy = {}
        if seconds:
            runs = {name: partial(_timed_pass, model, inputs[name]) for name, model in models.items()}
            energy = measure_energy(runs, counters, seconds=min(seconds, _ENERGY_SECONDS))

    return {
        name: _summary(passes[name], turns[name], model, batch_size, tokens, warmup, in_force, energy.get(name))
        for name, model in models.items()
    }


def speedup(base: Latency, candidate: Latency) -> Speedup:
    """Compare two models that `measure_latencies` timed together.

    Raises:
        ConfigError: they were not measured on the same batch, or not in the same rounds.

    Example:
        >>> import llmcompress.testing as lt
        >>> model = lt.tiny_model("bert")
        >>> found = measure_latencies({"a": model, "b": model}, tokens=8, seconds=0.01, progress=False)
        >>> faster = speedup(found["a"], found["b"])
        >>> faster.low <= faster.ratio <= faster.high
        True
    """
    ours, theirs = ((one.batch_size, one.tokens, len(one.turns_ms)) for one in (base, candidate))
    if ours != theirs:
        raise ConfigError(
            f"base and candidate must be timed together, got (batch, tokens, turns) {ours} and {theirs}; "
            "pass both to measure_latencies."
        )
    found = ratio_of(base.turns_ms, candidate.turns_ms)
    return Speedup(batch_size=base.batch_size, tokens=base.tokens, **found.model_dump())


def forward_inputs(model: PreTrainedModel, batch_size: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return random tokens that the forward pass of any text model takes, encoder-decoder classifiers included."""
    inputs = probe_inputs(model, rows=batch_size, tokens=tokens)
    if model.config.is_encoder_decoder:
        # The classifiers on top of encoder-decoders read the state at the end-of-text token.
        end = model.config.get_text_config().eos_token_id
        if any(cls.__name__.endswith("ForSequenceClassification") for cls in type(model).__mro__) and end is not None:
            inputs["input_ids"][:, -1] = end
            if getattr(model.config, "decoder_start_token_id", None) is not None:
                del inputs["decoder_input_ids"]
    return inputs


def _timed_pass(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> float:
    """Run one forward pass and return its milliseconds."""
    synchronize(model.device)
    begin = time.perf_counter()
    model(**inputs)
    synchronize(model.device)
    return (time.perf_counter() - begin) * 1000


def least_seconds(run: Callable[[], Any], device: torch.device, *, seconds: float, fewest: int = 1) -> float:
    """Return the least time of several runs behind one of warm-up: whatever else the machine does only adds.

    Args:
        run: what is timed; without gradients.
        device: that it runs on.
        seconds: how long to go on.
        fewest: runs that are timed at least.

    Example:
        >>> 0 < least_seconds(lambda: torch.ones(8).sum(), torch.device("cpu"), seconds=0) < 1
        True
    """
    least, begin, runs = float("inf"), time.perf_counter(), 0
    with torch.inference_mode():
        while runs <= fewest or time.perf_counter() - begin < seconds:
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            least = min(least, time.perf_counter() - start) if runs else least
            runs += 1
    return least


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was asked for; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _summary(
    passes: list[float],
    turns: list[float],
    model: PreTrainedModel,
    batch_size: int,
    tokens: int,
    warmup: int,
    threads: int,
    energy: Energy | None,
) -> Latency:
    p90, p99 = np.percentile(passes, [90, 99])
    median = statistics.median(passes)
    return Latency(
        batch_size=batch_size,
        tokens=tokens,
        median_ms=median,
        mean_ms=statistics.fmean(passes),
        p90_ms=float(p90),
        p99_ms=float(p99),
        tokens_per_second=batch_size * tokens / median * 1000,
        repeats=len(passes),
        warmup=warmup,
        threads=threads,
        interop_threads=torch.get_num_interop_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        turns_ms=tuple(turns),
        energy=energy,
    )
