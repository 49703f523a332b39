"""The protocol of the quality tables: what trained Llamas are calibrated on, and how their loss is counted."""

import statistics
from pathlib import Path

import torch


def texts_of(assets: Path) -> tuple[str, list[str]]:
    """Return the text to score on (100,000 characters), and the 64 texts of 1,200 characters to calibrate on."""
    story = next((assets / "tinystories").glob("*.txt")).read_text(encoding="utf-8").replace("\n\n", "\n")
    return story[:100_000], [story[400_000 + i * 1200 : 400_000 + (i + 1) * 1200] for i in range(64)]


def token_ids(tokenizer: object, text: str) -> torch.Tensor:
    """Return the ids of `text` without special tokens, shape (tokens,)."""
    return tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False).input_ids[0]


def training_texts(assets: Path, *, length: int = 2000) -> list[str]:
    """Return the stories behind those that are scored on, in texts of `length` characters."""
    story = next((assets / "tinystories").glob("*.txt")).read_text(encoding="utf-8").replace("\n\n", "\n")
    return [story[at : at + length] for at in range(110_000, len(story), length)]


@torch.inference_mode()
def window_losses(model: torch.nn.Module, ids: torch.Tensor, *, window: int = 256, windows: int = 60) -> list[float]:
    """Return the negative log-likelihood of each of the first non-overlapping windows, in nats a token."""
    losses = []
    for at in range(0, min(len(ids) - window, window * windows), window):
        tokens = ids[at : at + window][None]
        logits = model(input_ids=tokens).logits[0, :-1].float()
        losses.append(float(torch.nn.functional.cross_entropy(logits, tokens[0, 1:])))
    return losses


def loss(model: torch.nn.Module, ids: torch.Tensor, *, window: int = 256, windows: int = 60) -> float:
    """Return the mean of `window_losses`, which is that of all tokens: windows are equally long."""
    return statistics.fmean(window_losses(model, ids, window=window, windows=windows))
