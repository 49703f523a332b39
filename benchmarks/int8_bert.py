"""int8 against its peers on a model of BERT-base's shape (random weights): `python benchmarks/int8_bert.py`.

All engines take turns in each round, so that a busy machine slows all of them alike; what counts is the ratio of the
medians. Prints Markdown.
"""

from __future__ import annotations

import argparse
import copy
import io
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification

import llmcompress as lc
from _machine import describe_machine
from _turns import print_table, take_turns

Engine = Callable[[dict[str, torch.Tensor]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shapes", default="1x16,1x128,8x128", help="batch x tokens, comma-separated")
    parser.add_argument("--engines", default="", help="comma-separated part of the engines; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig()).eval()
    chosen = [name for name in arguments.engines.split(",") if name]
    makers = {name: make for name, make in ENGINES.items() if not chosen or name in chosen}
    engines = {name: make(model, arguments.threads) for name, make in makers.items()}
    print(f"# int8, BERT-base shape\n\n{describe_machine()}")
    print(f"- rounds: {arguments.rounds}, engines in turn, their order drawn anew each round\n")
    print("Median milliseconds a pass [10th, 90th percentile]; speed relative to fp32 eager.\n")
    shapes = [tuple(map(int, shape.split("x"))) for shape in arguments.shapes.split(",")]
    print_table(
        {
            f"{batch}x{tokens}": take_turns(engines, inputs_of(batch, tokens), arguments.rounds)
            for batch, tokens in shapes
        }
    )


def inputs_of(batch: int, tokens: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(1000, 20000, (batch, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def eager(model: torch.nn.Module) -> Engine:
    def run(inputs: dict[str, torch.Tensor]) -> object:
        with torch.inference_mode():
            return model(**inputs).logits

    return run


def fp32(model: BertForSequenceClassification, threads: int) -> Engine:
    return eager(model)


def bf16(model: BertForSequenceClassification, threads: int) -> Engine:
    return eager(copy.deepcopy(model).to(torch.bfloat16))


def ours(model: BertForSequenceClassification, threads: int) -> Engine:
    return eager(lc.DynamicQuantization().compress(copy.deepcopy(model), lc.Context()))


def ours_token(model: BertForSequenceClassification, threads: int) -> Engine:
    return eager(lc.DynamicQuantization(activations="token").compress(copy.deepcopy(model), lc.Context()))


def torch_ao(model: BertForSequenceClassification, threads: int) -> Engine:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return eager(quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8))


def onnx_int8(model: BertForSequenceClassification, threads: int) -> Engine:
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        names = ["input_ids", "attention_mask", "token_type_ids"]
        ids = torch.ones(2, 8, dtype=torch.long)
        torch.onnx.export(
            _Logits(model),
            (ids, ids, torch.zeros_like(ids)),
            str(source),
            input_names=names,
            output_names=["logits"],
            dynamic_axes={name: {0: "batch", 1: "tokens"} for name in names},
            dynamo=False,
        )
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(io.BytesIO(target.read_bytes()).getvalue(), options)

    def run(inputs: dict[str, torch.Tensor]) -> object:
        return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})

    return run


class _Logits(torch.nn.Module):
    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits


ENGINES: dict[str, Callable[[BertForSequenceClassification, int], Engine]] = {
    "torch fp32 eager": fp32,
    "torch bf16 eager": bf16,
    "llmcompress int8 (tensor)": ours,
    "llmcompress int8 (token)": ours_token,
    "torch.ao quantize_dynamic": torch_ao,
    "ONNX Runtime int8": onnx_int8,
}

if __name__ == "__main__":
    main()
