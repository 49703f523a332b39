"""Engines that run a model in int8 on a CPU, ours and its peers, and the command line by which they are timed."""

from __future__ import annotations

import argparse
import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import llmcompress as lc
from _machine import describe_machine
from _turns import print_table
from _workers import Maker, in_turn, workers
from llmcompress.testing import tiny_data, tiny_tokenizer

Engine = Callable[[dict[str, torch.Tensor]], object]


def command_line(description: str | None, columns: str, default: str, told: str) -> argparse.Namespace:
    """Read the options, `--columns` among them under the name of what a column is.

    Args:
        description: of the script.
        columns: what the columns of the table are, in the plural.
        default: the columns, comma-separated.
        told: what they are, in words.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(f"--{columns}", default=default, help=f"{told}, comma-separated")
    parser.add_argument("--engines", default="", help="comma-separated part of the engines; all by default")
    return parser.parse_args()


def print_turns(
    title: str, makers: Mapping[str, Maker], columns: Mapping[str, Any], arguments: argparse.Namespace
) -> None:
    """Time the engines that are asked for in turns, each in its process, and print what the table is of and the table.

    Args:
        title: of the table.
        makers: of all engines, by name.
        columns: what each engine is given, by the name of the column.
        arguments: from `command_line`.
    """
    names = [name for name in arguments.engines.split(",") if name] or list(makers)
    print(f"# {title}\n\n{describe_machine()}")
    print(f"- threads of the engines: {arguments.threads}, each in a process of its own")
    print(f"- rounds: {arguments.rounds}, engines in turn, their order drawn anew each round", flush=True)
    with workers({name: make for name, make in makers.items() if name in names}, arguments.threads) as engines:
        print("\nMedian milliseconds a pass [10th, 90th percentile]; speed relative to fp32 eager.\n", flush=True)
        print_table({column: in_turn(engines, given, arguments.rounds) for column, given in columns.items()})


def eager(run: Callable[..., object]) -> Engine:
    """Call with the inputs by name."""

    def engine(inputs: dict[str, torch.Tensor]) -> object:
        with torch.inference_mode():
            return run(**inputs)

    return engine


def dynamic(model: torch.nn.Module, activations: str = "token") -> torch.nn.Module:
    """Return ours, activations coded as they come."""
    return lc.DynamicQuantization(activations=activations).compress(copy.deepcopy(model), lc.Context())


def static(model: torch.nn.Module) -> torch.nn.Module:
    """Return ours with stored ranges: of a few short texts, which is all that the time depends on."""
    context = lc.Context(data=tiny_data(model), tokenizer=tiny_tokenizer())
    return lc.StaticQuantization(outliers=None).compress(copy.deepcopy(model), context)


def torch_ao(model: torch.nn.Module) -> torch.nn.Module:
    """Return that of `torch.ao`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        return quantize_dynamic(copy.deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)


def onnx_int8(
    model: torch.nn.Module,
    example: Mapping[str, torch.Tensor],
    outputs: Sequence[str],
    dynamic_axes: Mapping[str, Mapping[int, str]],
    threads: int,
) -> Engine:
    """Export `model`, quantize it by ONNX Runtime's own tool, and run it there.

    Args:
        model: maps the tensors of `example`, in order, to `outputs`.
        example: inputs to trace it with, by name.
        outputs: their names.
        dynamic_axes: of inputs and outputs, as `torch.onnx.export` takes them.
        threads: of a product.
    """
    import onnxruntime
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        torch.onnx.export(
            model,
            tuple(example.values()),
            str(source),
            input_names=list(example),
            output_names=list(outputs),
            dynamic_axes={name: dict(axes) for name, axes in dynamic_axes.items()},
            dynamo=False,
        )
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(target.read_bytes(), options)

    def run(inputs: dict[str, torch.Tensor]) -> object:
        return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})

    return run
