"""int8 against its peers on a model of BERT-base's shape (random weights): `python benchmarks/int8_bert.py`.

Each engine has a process of its own, and all take turns in each round, so that a busy machine slows all of them alike;
what counts is the ratio of the medians. Prints Markdown.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from transformers import BertConfig, BertForSequenceClassification

from _int8_engines import Engine, dynamic, eager, onnx_int8, static, torch_ao
from _workers import command_line, print_turns


def main() -> None:
    arguments = command_line(__doc__, "shapes", "1x16,1x128,8x128", "batch x tokens")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    columns = {f"{batch}x{tokens}": inputs_of(batch, tokens) for batch, tokens in shapes}
    print_turns("int8, BERT-base shape", {name: partial(engine, name) for name in ENGINES}, columns, arguments)


def engine(name: str, threads: int) -> Engine:
    """Return one of `ENGINES`, in its own process."""
    return ENGINES[name](BertForSequenceClassification(BertConfig()).eval(), threads)


def inputs_of(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def bf16(model: BertForSequenceClassification, threads: int) -> Engine:
    return eager(copy.deepcopy(model).to(torch.bfloat16))


def onnx(model: BertForSequenceClassification, threads: int) -> Engine:
    example = inputs_of(2, 8)
    axes = {name: {0: "batch", 1: "tokens"} for name in example}
    return onnx_int8(_Logits(model).eval(), example, ["logits"], axes, threads)


class _Logits(torch.nn.Module):
    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits


ENGINES: dict[str, Callable[[BertForSequenceClassification, int], Engine]] = {
    "torch fp32 eager": lambda model, threads: eager(model),
    "torch bf16 eager": bf16,
    "llmcompress int8 (token)": lambda model, threads: eager(dynamic(model)),
    "llmcompress int8 (tensor)": lambda model, threads: eager(dynamic(model, "tensor")),
    "llmcompress int8 (static)": lambda model, threads: eager(static(model)),
    "torch.ao quantize_dynamic": lambda model, threads: eager(torch_ao(model)),
    "ONNX Runtime int8": onnx,
}

if __name__ == "__main__":
    main()
