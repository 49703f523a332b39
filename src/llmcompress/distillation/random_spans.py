"""More texts out of few without any model: parts of them, alone or behind one another."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field

from ..compressor import Settings
from ..data import Example


class RandomSpans(Settings):
    """Random spans of the texts, as phrases stand beside whole sentences in SST-2's full training set.

    Each copy is a run of words of a text, of any length from `shortest` to all of it, and with probability `joined` a
    run of up to half of it, followed by one of another text. Copies have no label: the student learns from them what
    the teacher makes of them. Of a pair each of both texts gives a run, and none is joined.

    Args:
        copies: of each text.
        shortest: words of the shortest run; shorter texts stay whole.
        joined: probability that a copy is made of runs of two texts.

    Example:
        >>> spans = RandomSpans(copies=2, joined=0.0)
        >>> texts = [Example("a fine film that nobody has seen", label=1)]
        >>> [one.text for one in spans.copies_of(texts, device="cpu", seed=1, progress=False)]
        ['film that nobody', 'fine film that nobody has seen']
        >>> RandomSpans(shortest=0)
        Traceback (most recent call last):
        llmcompress.errors.ConfigError: RandomSpans.shortest must be in (0, inf), got 0.
    """

    name: Literal["random_spans"] = Field("random_spans", description="which augmentation it is")
    copies: int = Field(4, gt=0, description="of each text")
    shortest: int = Field(3, gt=0, description="words of the shortest run")
    joined: float = Field(0.5, ge=0, le=1, description="probability that a copy is made of runs of two texts")

    @property
    def does(self) -> str:
        """What a plan says of it."""
        joined = f", {self.joined:.0%} of them joined to another's (of pairs none)" if self.joined else ""
        return f"add {self.copies} random spans of each text{joined}"

    def check(self) -> None:
        """Refuse nothing: no model is asked for."""

    def copies_of(
        self, examples: Sequence[Example], *, device: torch.device | str, seed: int, progress: bool
    ) -> list[Example]:
        """Return the copies, without labels; a copy that is the whole text is left out."""
        draw = random.Random(seed)
        made = []
        for example in examples:
            for _ in range(self.copies):
                if example.pair is None and draw.random() < self.joined:
                    parts = [self._run(text, draw, share=0.5) for text in (example.text, draw.choice(examples).text)]
                    copy = replace(example, text=" ".join(parts), label=None)
                else:
                    pair = example.pair and self._run(example.pair, draw)
                    copy = replace(example, text=self._run(example.text, draw), pair=pair, label=None)
                if (copy.text, copy.pair) != (example.text, example.pair):
                    made.append(copy)
        return made

    def _run(self, text: str, draw: random.Random, share: float = 1.0) -> str:
        words = text.split()
        shortest = min(self.shortest, len(words))
        length = draw.randint(shortest, max(shortest, int(share * len(words))))
        begin = draw.randint(0, len(words) - length)
        return " ".join(words[begin : begin + length])
