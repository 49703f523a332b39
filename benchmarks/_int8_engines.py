"""Engines that run a model in int8 on a CPU, ours and its peers."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_tokenizer

Engine = Callable[[dict[str, torch.Tensor]], object]


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
