"""The proof by reload: a saved folder read by plain transformers, here or in a process of its own.

`python -m llmcompress.demo.reload FOLDER EXAMPLES.json LOGITS.json` is that process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..data import Example, encode
from ..errors import VerificationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Agreement:
    """How far two models agree.

    Attributes:
        equal: examples that both give the same class.
        of: examples.
        largest: largest absolute difference of a logit.
    """

    equal: int
    of: int
    largest: float


def reload_agrees(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    examples: Sequence[Example],
    *,
    max_length: int,
) -> Agreement:
    """Load `folder` in a fresh process and compare its logits on `examples` with those of `model`.

    Raises:
        VerificationError: the process failed.
    """
    here = logits(model, tokenizer, examples, max_length=max_length)
    rows = [[example.text, example.pair] for example in examples]
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as exchange:
        asked, answered = Path(exchange, "examples.json"), Path(exchange, "logits.json")
        question = {"rows": rows, "max_length": max_length, "threads": torch.get_num_threads()}
        asked.write_text(json.dumps(question))
        command = [sys.executable, "-m", __name__, str(folder), str(asked), str(answered)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message"
            raise VerificationError(f"{folder} could not be read in a fresh process: {last}")
        there = torch.tensor(json.loads(answered.read_text()))
    equal = int((here.argmax(-1) == there.argmax(-1)).sum())
    return Agreement(equal=equal, of=len(here), largest=float((here - there).abs().max()))


def logits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], *, max_length: int
) -> torch.Tensor:
    """Return the logits of each example, one at a time: a batch would share the scale of its int8 activations."""
    encoded = encode(examples, tokenizer, max_length=max_length)
    with torch.inference_mode():
        rows = [model(**{key: torch.tensor([value]) for key, value in row.items()}) for row in encoded]
    return torch.cat([row.logits.float() for row in rows])


def main(folder: str, asked: str, answered: str) -> None:
    """Answer one question of `reload_agrees`; nothing but the import of llmcompress is special here."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    import llmcompress  # noqa: F401 - makes its quantization method known to transformers

    question = json.loads(Path(asked).read_text())
    torch.set_num_threads(question["threads"])
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    examples = [Example(text, pair) for text, pair in question["rows"]]
    found = logits(model, AutoTokenizer.from_pretrained(folder), examples, max_length=question["max_length"])
    Path(answered).write_text(json.dumps(found.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
