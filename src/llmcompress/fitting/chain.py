"""From a choice to the steps that do it, and what they are called in a table."""

from __future__ import annotations

import glob
from dataclasses import dataclass

from ..compressor import Compressor, Rounds
from ..distillation.distillation import KnowledgeDistillation
from ..pruning.depth import DepthPruning
from .predictor import Predictor
from .solver import Solution
from .space import SCHEMES, quantization

# Below so many bits a model is trained for its rounding.
_TRAINED_FOR = 8


@dataclass(frozen=True)
class Chain:
    """The steps of a choice.

    Attributes:
        name: in a few words.
        solution: the choice.
        cuts: what makes it smaller, in float.
        quantization: the last step, or None.
        rounded: whether the recovery shall be trained for that rounding.
        float_ms: what a pass through it takes before it is quantized, in milliseconds.
    """

    name: str
    solution: Solution
    cuts: tuple[Compressor, ...]
    quantization: Compressor | None
    rounded: bool
    float_ms: float

    @property
    def recovers(self) -> bool:
        """Whether there is something that a training can give back."""
        return bool(self.cuts) or self.rounded

    def steps(self, recovery: KnowledgeDistillation | None = None) -> list[Compressor]:
        """Return all steps, with `recovery` behind the cuts and before the quantization."""
        steps = list(self.cuts)
        if recovery is not None and self.recovers:
            rounds = self.rounded and isinstance(self.quantization, Rounds)
            steps.append(recovery.model_copy(update={"quantize_for": self.quantization}) if rounds else recovery)
        return steps if self.quantization is None else [*steps, self.quantization]


def chain_of(predictor: Predictor, solution: Solution) -> Chain:
    """Return the steps that do what a solution says."""
    space, shape, vocabulary = predictor.space, predictor.shape(solution), predictor.vocabulary(solution)
    cuts: list[Compressor] = []
    words: list[str] = []
    if (cut := vocabulary.step()) is not None:
        cuts.append(cut)
        words.append("seen tokens" if vocabulary.share is None else f"{vocabulary.share:.0%} of the seen tokens")
    if (narrow := shape.step()) is not None:
        cuts.append(narrow)
        words += [f"FFN -{shape.ffn:.0%}"] if shape.ffn else []
        words += [f"heads -{shape.heads:.0%}"] if shape.heads else []
    depths: list[Compressor] = []
    overrides: dict[str, int] = {}
    for stack, numbers in zip(space.stacks, space.stack_blocks, strict=True):
        kept = [number for number in numbers if number in solution.kept]
        if len(kept) < len(numbers):
            layers = tuple(number - numbers[0] for number in kept)
            alone = len(space.stacks) == 1
            depths.append(DepthPruning(layers=layers, targets=None if alone else (glob.escape(stack.path),)))
            words.append(f"{'layers' if alone else stack.path} {','.join(map(str, layers))} of {len(numbers)}")
        for place, number in enumerate(kept):
            overrides[f"{glob.escape(stack.block_path(place))}.*"] = solution.kept[number].bits
    # A decoder goes first: where it may be no deeper than its encoder, that holds behind each step.
    cuts += reversed(depths)
    overrides.update({glob.escape(name): solution.rest.bits for name in space.rest})
    scheme = SCHEMES[solution.skeleton.scheme]
    fewest = min(overrides.values(), default=8)
    if scheme == "packed":
        uniform = set(overrides.values()) == {fewest}
        words.append(f"{fewest} bits packed" if uniform else f"{fewest} and 8 bits packed")
    elif scheme == "int8":
        words.append("int8")
    last = quantization(scheme, fewest, overrides, space.unpacked)
    rounded = scheme == "packed" and fewest < _TRAINED_FOR
    name = ", ".join(words) or "as it is"
    return Chain(name, solution, tuple(cuts), last, rounded, predictor.float_ms(solution))
