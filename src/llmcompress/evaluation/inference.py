"""The state in which a model is measured: eval mode, no gradients, no bars, and everything as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ..anatomy.kept import modes_kept

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Hold `model` in eval mode under `inference_mode`, then give every module its own train/eval mode back.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
        >>> with evaluating(model):
        ...     print(model.training, torch.is_inference_mode_enabled())
        False True
        >>> [module.training for module in model.modules()]
        [True, True, False]
    """
    with modes_kept(model), torch.inference_mode():
        model.eval()
        yield


@contextmanager
def threads_set_to(threads: int | None) -> Iterator[int]:
    """Run with so many intra-op threads (None leaves them as they are), and yield the number in force."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@contextmanager
def bars_hidden() -> Iterator[None]:
    """Keep transformers' bar over the files off the terminal: whoever loads or saves by the way did not ask for it."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
