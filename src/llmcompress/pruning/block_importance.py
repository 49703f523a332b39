"""What each block does for a model, on real texts: how far it turns the hidden states, or the loss without it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn import functional
from tqdm.auto import tqdm

from ..anatomy.stacks import Stack
from ..calibration.replay import Batch, Forward, replaced
from ..errors import CompressionError, UnsupportedModelError
from .bypass import bypassed, run_block

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Measure = Literal["cosine", "angle"]


def turning(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    spans: Mapping[str, int],
    stacks: Sequence[Stack],
    *,
    measure: Measure,
    who: str,
    progress: bool = False,
) -> dict[str, list[float]]:
    """Return how far each run of blocks turns the hidden states, as a mean over all tokens.

    The states before the run and behind it are compared: `"cosine"` is 1 - cos, in [0, 2] (block influence of ShortGPT,
    arXiv 2403.03853), `"angle"` is arccos(cos) / pi, in [0, 1] (angular distance of arXiv 2403.17887, there of the last
    token of each text).

    Args:
        model: the model; not changed.
        batches: from `calibration_batches`.
        spans: for the path of each stack, how many consecutive blocks make a run.
        stacks: the stacks with these paths.
        measure: how two states are compared.
        who: the strategy's name, for messages.
        progress: whether to show a progress bar over the batches.

    Returns:
        By the stack's path, one number for each run: entry i is the run that begins with block i.

    Raises:
        CompressionError: hidden states are NaN or infinite; the message names the block.
        UnsupportedModelError: a block does not run, or changes the shape of its hidden states.

    Example:
        >>> from llmcompress.anatomy.stacks import find_stacks
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("llama")
        >>> found = turning(model, [tiny_inputs(model)], {"model.layers": 1}, find_stacks(model), measure="angle",
        ...                 who="example")
        >>> [0 < distance < 1 for distance in found["model.layers"]]
        [True, True]
    """
    sums = {stack.path: [0.0] * (len(stack) - spans[stack.path] + 1) for stack in stacks if stack.path in spans}
    counts = {path: [0] * len(totals) for path, totals in sums.items()}
    before: dict[str, deque[torch.Tensor]] = {path: deque(maxlen=spans[path]) for path in sums}

    def listening(stack: Stack, index: int, own: Callable[..., Any]) -> Callable[..., Any]:
        path, span = stack.path, spans[stack.path]

        def forward(*args: Any, **kwargs: Any) -> Any:
            passed = run_block(stack.block_path(index), own, args, kwargs)
            if not bool(torch.isfinite(passed.behind).all()):
                raise CompressionError(
                    f"{who}: {stack.block_path(index)} puts out NaN or infinity on the calibration texts; repair the "
                    f"checkpoint first."
                )
            states = before[path]
            states.append(passed.before)
            if index + 1 >= span and len(states) == span:
                distance = _distance(states[0], passed.behind, measure)
                sums[path][index + 1 - span] += float(distance.sum(dtype=torch.float64))
                counts[path][index + 1 - span] += distance.numel()
            return passed.outputs

        return forward

    forwards = {
        stack.block_path(index): partial(listening, stack, index)
        for stack in stacks
        if stack.path in spans
        for index in range(len(stack))
    }
    run = Forward(model, all_logits=False)
    with replaced(model, forwards):
        for batch in tqdm(batches, desc=who, disable=not progress):
            for states in before.values():
                states.clear()
            run(batch)
    for path, seen in counts.items():
        if 0 in seen:
            raise UnsupportedModelError(
                f"{who}: block {seen.index(0)} of {path} in {type(model).__name__} does not run in a plain forward "
                f"pass; choose blocks with layers=(0, ...) or criterion='last'."
            )
    return {path: [total / count for total, count in zip(sums[path], counts[path], strict=True)] for path in sums}


def losses_without(
    model: PreTrainedModel, batches: Sequence[Batch], gone: Sequence[Sequence[str]], *, who: str
) -> list[float]:
    """Return the model's loss for each set of blocks that is bypassed, a mean over what is predicted; NaN is infinite.

    Language models with a causal head (the decoder of an encoder-decoder too) are asked for the next token, in nats.
    All others are compared with the model as it is: KL divergence of their classes in nats, or for one class or hidden
    states the mean squared difference.

    Args:
        model: the model; not changed.
        batches: from `calibration_batches`.
        gone: for each set, the paths of its blocks.
        who: the strategy's name, for messages.

    Raises:
        CompressionError: there is nothing to predict.

    Example:
        >>> from llmcompress.testing import tiny_inputs, tiny_model
        >>> model = tiny_model("bert")
        >>> dense, less = losses_without(model, [tiny_inputs(model)], [[], ["bert.encoder.layer.0"]], who="example")
        >>> dense < less
        True
    """
    run = Forward(model, all_logits=True)
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    predicts = model.can_generate() and model.get_output_embeddings() is not None
    sums, count = [0.0] * len(gone), 0
    for batch in batches:
        targets = batch[key][:, 1:]
        if predicts and not targets.numel():
            continue
        dense = None if predicts else run(batch)
        for number, paths in enumerate(gone):
            with bypassed(model, paths):
                outputs = run(batch)
            if dense is None:
                # Row by row: the logits of a large vocabulary are long, and this makes copies of them.
                for row, wanted in zip(outputs.logits[:, :-1], targets, strict=True):
                    sums[number] += float(functional.cross_entropy(row.float(), wanted, reduction="sum"))
            else:
                sums[number] += _difference(outputs, dense)
        count += targets.numel() if dense is None else dense[0][..., 0].numel()
    if not count:
        raise CompressionError(f"{who}: texts of one token have nothing to predict; pass longer ones.")
    return [total / count if math.isfinite(total) else math.inf for total in sums]


def _difference(outputs: Any, dense: Any) -> float:
    ours, theirs = outputs[0].float(), dense[0].float()
    if getattr(dense, "logits", None) is None or theirs.shape[-1] == 1:
        return float((ours - theirs).square().mean(-1).sum())
    return float(functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True))


def _distance(before: torch.Tensor, behind: torch.Tensor, measure: Measure) -> torch.Tensor:
    cosine = functional.cosine_similarity(before.float(), behind.float(), dim=-1).clamp(-1, 1)
    return 1 - cosine if measure == "cosine" else cosine.arccos() / math.pi
