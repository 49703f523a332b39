"""Which layers of a model suffer from few bits, and how much: `lc.sensitivity`."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from ..compressor import Context
from ..data import load_examples
from ..errors import ConfigError
from .fitting import Fit
from .measuring import Method, measure
from .sensitivity_table import Sensitivity
from .weight_only import WeightOnlyQuantization

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def sensitivity(
    model: PreTrainedModel,
    data: Any,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    bits: Collection[int] = (2, 3, 4, 8),
    group_size: int | None = 64,
    symmetric: bool = False,
    fit: Fit = "min_max",
    indivisible: Literal["error", "pad", "smaller_group"] = "error",
    targets: tuple[str, ...] | None = None,
    skip: tuple[str, ...] = (),
    method: Method = "auto",
    samples: int = 32,
    max_length: int = 256,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Round each layer alone to each number of bits, and tell how far the model's answers move.

    The damage is the mean KL(base || rounded) of the next token (the class of a text, the token at each place) over
    calibration texts, in nats. Damages of single layers add up to about that of all together, so that the bits of each
    layer can be chosen by them: `found.allocate(4.5)`, or `bits="auto"` of a strategy, which does all of this.

    Args:
        model: a float model with a head; the same afterwards.
        data: texts, as for `lc.compress`.
        tokenizer: makes tokens of them; None takes the one in the model's folder.
        bits: widths to try, each 2 to 8.
        group_size: consecutive inputs that share a scale, a multiple of 8; None is a whole row.
        symmetric: whether to do without zero points.
        fit: how grids are laid, as in `WeightOnlyQuantization`.
        indivisible: what to do where `group_size` does not divide the inputs of a layer.
        targets: patterns of layers; None takes the linear layers of the repeated blocks.
        skip: patterns of layers to leave out.
        method: `"kl"` measures: a pass from the layer's block on for each layer and width. `"fisher"` estimates to
            second order, from one backward pass a text and the squared errors of the weights; it takes memory for two
            more float32 copies of the weights. `"auto"` measures where that takes seconds.
        samples: texts at most.
        max_length: tokens of a text at most.
        seed: draws the texts, and for `"fisher"` the answers.
        progress: whether to show a progress bar.

    Returns:
        A table of all, with a heat map: `print(found)`, `found.plot("map.png")`.

    Raises:
        ConfigError: a width is out of range or none is given, or the group size does not divide.
        MissingInputError: no texts or no tokenizer.
        UnsupportedModelError: the model is quantized, or reads no token ids.
        NothingToCompressError: no layer matches.
        CompressionError: weights or answers are NaN or infinite.

    Source:
        KL as the measure of a layer's sensitivity: ZeroQ, Cai et al. 2020, arXiv 2001.00281; the integer program over
        second-order damages: HAWQ-V3, Yao et al. 2021, arXiv 2011.10680.

    Example:
        >>> import llmcompress as lc
        >>> from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer
        >>> model = tiny_model("llama")
        >>> found = lc.sensitivity(model, tiny_data(model), tokenizer=tiny_tokenizer(), bits=(2, 4), progress=False)
        >>> len(found.rows), found.method, found.predicted(4) < found.predicted(2)
        (28, 'kl', True)
    """
    who = "sensitivity"
    if (
        not isinstance(bits, Collection)
        or not bits
        or not all(type(width) is int and 2 <= width <= 8 for width in bits)
    ):
        raise ConfigError(f"{who}.bits must be some of 2 to 8, such as (2, 4), got {bits!r}.")
    widths = sorted(set(bits))
    if samples < 1 or max_length < 1:
        raise ConfigError(f"{who}: samples and max_length must be at least 1, got {samples} and {max_length}.")
    if method not in ("auto", "kl", "fisher"):
        raise ConfigError(f"{who}.method must be 'auto', 'kl' or 'fisher', got {method!r}.")
    step = WeightOnlyQuantization(
        group_size=group_size, symmetric=symmetric, fit=fit, indivisible=indivisible, targets=targets, skip=skip
    )
    context = Context(data=load_examples(data), tokenizer=tokenizer, seed=seed, progress=progress)
    layers, _ = step._choose(model)
    return measure(
        model,
        context,
        [target.layer for target in layers],
        step._grid_for,
        who=who,
        bits=widths,
        fit=fit,
        group_size=group_size,
        samples=samples,
        max_length=max_length,
        method=method,
    )
