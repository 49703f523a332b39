"""How long a model takes to write: to its first token, and for each one after it, with the cache of keys and values."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pydantic import BaseModel, Field

from ..anatomy.probe import probe_inputs
from ..data import longest_input
from ..errors import ConfigError, MissingInputError, UnsupportedModelError
from .inference import evaluating, threads_set_to
from .latency import QUICK_MS, synchronize
from .tasks.task import check_positive
from .turns import Ratio, check_seconds, ratio_of, take_turns

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GenerationLatency(BaseModel, frozen=True, extra="forbid"):
    """Time of greedy generation from a random prompt; nothing ends it early.

    The steps are those of `generate` without its bookkeeping around them: the prompt in one pass, then token by token.
    """

    batch_size: int = Field(description="prompts at once")
    prompt_tokens: int = Field(description="tokens a prompt")
    new_tokens: int = Field(description="tokens that each prompt is continued by")
    first_token_ms: float = Field(description="median time to the first token: the prefill, or encoder and first step")
    first_token_p90_ms: float = Field(description="nine of ten are at most so long")
    token_ms: float = Field(description="median time of a further token, for all rows together")
    token_p90_ms: float
    tokens_per_second: float = Field(description="further tokens a second: batch_size over token_ms")
    repeats: int = Field(description="generations timed")
    warmup: int = Field(description="generations before them")
    threads: int = Field(description="intra-op threads of torch")
    interop_threads: int = Field(description="inter-op threads of torch")
    dtype: str = Field(description="dtype of most floating-point weights; what a quantized layer computes in")
    device: str
    turns_first_token_ms: tuple[float, ...] = Field(description="of each turn, in order; two turns make a round")
    turns_token_ms: tuple[float, ...] = Field(description="median of each turn's further tokens")


class GenerationSpeedup(BaseModel, frozen=True, extra="forbid"):
    """How many times faster than the base a model writes."""

    batch_size: int
    prompt_tokens: int
    new_tokens: int
    first_token: Ratio = Field(description="of the times to the first token")
    token: Ratio = Field(description="of the times of a further token")


def measure_generation(
    models: Mapping[str, PreTrainedModel],
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 16,
    batch_size: int = 1,
    warmup: int = 1,
    seconds: float = 2.0,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, GenerationLatency]:
    """Time several models that generate, taking turns as in `measure_latencies`.

    Args:
        models: by name; their modes are given back.
        prompt_tokens: tokens a prompt, random ones.
        new_tokens: tokens to generate, at least 2.
        batch_size: prompts at once.
        warmup: generations before the first timed one.
        seconds: how long to measure each model, at least six rounds whatever it says.
        threads: intra-op threads of torch while it measures; None leaves them.
        progress: whether a bar is shown.

    Raises:
        MissingInputError: there is no model.
        ConfigError: a number is out of range, or prompt and new tokens are more than a model can take.
        UnsupportedModelError: a model does not generate, or keeps no cache of keys and values.

    Example:
        >>> import llmcompress.testing as lt
        >>> models = {"llama": lt.tiny_model("llama")}
        >>> found = measure_generation(models, prompt_tokens=8, new_tokens=4, seconds=0.0, progress=False)["llama"]
        >>> found.token_ms <= found.token_p90_ms
        True
    """
    if not models:
        raise MissingInputError("measure_generation.models is empty; pass at least one model.")
    check_positive("prompt_tokens", prompt_tokens, optional=False)
    check_positive("new_tokens", new_tokens, least=2, optional=False)
    check_positive("batch_size", batch_size, optional=False)
    check_positive("warmup", warmup, least=0, optional=False)
    check_positive("threads", threads)
    check_seconds(seconds)
    for model in models.values():
        check_generates(model)
        check_length(model, prompt_tokens, new_tokens)
    prompts = {name: prompt_for(model, batch_size, prompt_tokens) for name, model in models.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in models}

    with ExitStack() as stack:
        in_force = stack.enter_context(threads_set_to(threads))
        for model in models.values():
            stack.enter_context(evaluating(model))
        first_steps = [
            generate_greedily(model, prompts[name], new_tokens).milliseconds[1]
            for name, model in models.items()
            for _ in range(warmup)
        ]
        quick = not first_steps or min(first_steps) < QUICK_MS

        def take_turn(name: str) -> None:
            if quick:
                generate_greedily(models[name], prompts[name], 2)
            times[name].append(generate_greedily(models[name], prompts[name], new_tokens).milliseconds)

        title = f"generation {batch_size}x({prompt_tokens}+{new_tokens})"
        take_turns(take_turn, list(models), seconds=seconds, title=title, progress=progress)

    found = {}
    for name, model in models.items():
        first, further = [turn[0] for turn in times[name]], [turn[1:] for turn in times[name]]
        token = statistics.median(one for turn in further for one in turn)
        found[name] = GenerationLatency(
            batch_size=batch_size,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            first_token_ms=statistics.median(first),
            first_token_p90_ms=float(np.percentile(first, 90)),
            token_ms=token,
            token_p90_ms=float(np.percentile([one for turn in further for one in turn], 90)),
            tokens_per_second=batch_size / token * 1000,
            repeats=len(first),
            warmup=warmup,
            threads=in_force,
            interop_threads=torch.get_num_interop_threads(),
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
            turns_first_token_ms=tuple(first),
            turns_token_ms=tuple(statistics.median(turn) for turn in further),
        )
    return found


def generation_speedup(base: GenerationLatency, candidate: GenerationLatency) -> GenerationSpeedup:
    """Compare two models that `measure_generation` timed together.

    Raises:
        ConfigError: they did not write the same number of tokens from the same prompts, or not in the same rounds.
    """
    ours, theirs = ((one.batch_size, one.prompt_tokens, one.new_tokens) for one in (base, candidate))
    if ours != theirs:
        raise ConfigError(
            f"base and candidate must be timed together, got (batch, prompt, new tokens) {ours} and {theirs}; "
            "pass both to measure_generation."
        )
    return GenerationSpeedup(
        batch_size=base.batch_size,
        prompt_tokens=base.prompt_tokens,
        new_tokens=base.new_tokens,
        first_token=ratio_of(base.turns_first_token_ms, candidate.turns_first_token_ms),
        token=ratio_of(base.turns_token_ms, candidate.turns_token_ms),
    )


def generates(model: PreTrainedModel) -> bool:
    """Whether `model` writes text token by token with a cache of keys and values.

    Example:
        >>> import llmcompress.testing as lt
        >>> generates(lt.tiny_model("llama")), generates(lt.tiny_model("bert"))
        (True, False)
    """
    return model.can_generate() and "past_key_values" in inspect.signature(model.forward).parameters


def check_generates(model: PreTrainedModel) -> None:
    """Refuse a model whose generation cannot be timed.

    Raises:
        UnsupportedModelError: it does not generate, or keeps no cache of keys and values.
    """
    if generates(model):
        return
    lacks = "keeps no cache of keys and values" if model.can_generate() else "does not generate"
    raise UnsupportedModelError(
        f"generation can be timed only for models that generate with a cache of keys and values; "
        f"{type(model).__name__} {lacks}: leave generation out (generation=False)."
    )


@dataclass
class Generated:
    """What a greedy generation wrote, and when.

    Attributes:
        tokens: of shape (rows, new tokens).
        milliseconds: each token's, the first one with the whole prompt in it.
    """

    tokens: torch.Tensor
    milliseconds: list[float] = field(default_factory=list)


@torch.inference_mode()
def generate_greedily(model: PreTrainedModel, prompt: Mapping[str, torch.Tensor], new_tokens: int) -> Generated:
    """Continue `prompt` by `new_tokens` tokens, each the most likely one, and time each of them.

    Args:
        model: in eval mode; decoders continue the prompt, encoder-decoders read it and write.
        prompt: `input_ids` and `attention_mask` of shape (rows, tokens), without padding.
        new_tokens: at least 1.

    Raises:
        UnsupportedModelError: the model returns no cache.
    """
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    rows = ids.shape[0]
    writes_apart = bool(model.config.is_encoder_decoder)
    # All that is not the model's own work is done before the clock runs.
    whole = mask if writes_apart else torch.cat([mask, mask.new_ones(rows, new_tokens)], dim=1)
    begin_ids = ids.new_full((rows, 1), start_token(model)) if writes_apart else ids
    last_only: dict[str, Any] = (
        {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    )
    tokens, milliseconds = [], []
    past, given, encoded = None, begin_ids, None
    for step in range(new_tokens):
        synchronize(model.device)
        begin = time.perf_counter()
        if writes_apart:
            if encoded is None:
                encoded = model.get_encoder()(input_ids=ids, attention_mask=mask)
            inputs = {"encoder_outputs": encoded, "decoder_input_ids": given, "attention_mask": whole}
        else:
            inputs = {"input_ids": given, "attention_mask": whole[:, : ids.shape[1] + step]}
        outputs = model(**inputs, past_key_values=past, use_cache=True, **last_only)
        given = outputs.logits[:, -1:].argmax(-1)
        synchronize(model.device)
        milliseconds.append((time.perf_counter() - begin) * 1000)
        past = getattr(outputs, "past_key_values", None)
        if past is None:
            raise UnsupportedModelError(
                f"{type(model).__name__} returned no cache of keys and values, which timing generation needs; leave "
                "generation out (generation=False)."
            )
        tokens.append(given)
    return Generated(torch.cat(tokens, dim=1), milliseconds)


def prompt_for(model: PreTrainedModel, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return random prompts of shape (rows, tokens) that any generating text model takes."""
    inputs = probe_inputs(model, rows=rows, tokens=tokens)
    return {key: inputs[key] for key in ("input_ids", "attention_mask")}


def start_token(model: PreTrainedModel) -> int:
    """Return the token that an encoder-decoder begins to write after."""
    config = model.generation_config
    named = (config.decoder_start_token_id, model.config.get_text_config().decoder_start_token_id, config.bos_token_id)
    token = next((token for token in named if token is not None), 0)
    return int(token[0] if isinstance(token, list) else token)


def check_length(model: PreTrainedModel, prompt_tokens: int, new_tokens: int) -> None:
    """Refuse more tokens than `model` can take.

    Raises:
        ConfigError: naming the most it can.
    """
    most = longest_input(model)
    needed = max(prompt_tokens, new_tokens) if model.config.is_encoder_decoder else prompt_tokens + new_tokens
    if most is not None and needed > most:
        raise ConfigError(
            f"prompt_tokens and new_tokens must be at most {most} together for {type(model).__name__}, "
            f"got {prompt_tokens} + {new_tokens}."
        )
