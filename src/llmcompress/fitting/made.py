"""A changed copy of a model, made as `lc.compress` makes it but with nothing measured and nothing told."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..compressor import Compressor, Context
from ..measured import seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Made:
    """A changed model and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def make(model: PreTrainedModel, steps: Iterable[Compressor], context: Context) -> Made:
    """Do `steps` to a copy of `model`.

    Raises:
        Exception: whatever a step breaks on.
    """
    own = replace(context, history=[], told=[], corrected=set())
    changed = copy.deepcopy(model)
    for step in steps:
        with seeded(context.seed):
            changed = step.compress(changed.eval(), own)
    assert own.tokenizer is not None
    return Made(changed.eval(), own.tokenizer)
