"""One pass through 32 linear layers of 2048x2048, by everything that multiplies weights of few bits on this machine.

    python benchmarks/linear_stack.py --threads 1

Each engine has a process of its own, and all take turns in each round, so that a busy machine slows all of them alike;
what counts is the ratio of the medians. OpenVINO runs where `openvino` is installed. Prints Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from _workers import Maker, command_line, print_turns
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Grid
from llmcompress.quantization.kernels.native import Chain, native
from llmcompress.quantization.modules import Int8Linear
from llmcompress.quantization.packed_modules import Compute, PackedLinear

LAYERS, WIDTH = 32, 2048
Engine = Callable[[torch.Tensor], object]


def stack() -> list[nn.Linear]:
    """Return the layers, the same in every process."""
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]


def fp32(threads: int) -> Engine:
    return nn.Sequential(*stack())


def bf16(threads: int) -> Engine:
    cast = nn.Sequential(*stack()).bfloat16()
    return lambda x: cast(x.bfloat16())


def int8(threads: int) -> Engine:
    return nn.Sequential(*(Int8Linear.from_float(layer) for layer in stack()))


def fbgemm_int8(threads: int) -> Engine:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(*stack()), {nn.Linear}, torch.qint8)


def packed(grid: Grid, compute: Compute, threads: int) -> Engine:
    coded = (PackedLinear.from_coded(layer, quantize(layer.weight, grid), grid, compute) for layer in stack())
    return nn.Sequential(*coded)


def chained(grid: Grid, threads: int) -> Engine:
    """Calls all layers at once, as the layers of a Transformer's block are called."""
    layers = list(packed(grid, "int8", threads))
    chain = Chain(native())
    x = chain.given(WIDTH)
    for layer in layers:
        product, bias, _ = layer.computed_by()
        x = chain.product(x, product.step(bias))
    run = chain.finish(x)
    # The chain reads the tensors of the layers, and keeps none of them.
    return lambda given, layers=layers: run(given)


def plain_read(threads: int) -> Engine:
    """Reads what int4 with groups of 128 has, and does nothing with it."""
    grid = Grid(4, 128)
    read = []
    for layer in stack():
        coded = PackedLinear.from_coded(layer, quantize(layer.weight, grid), grid)
        # As whole numbers, which torch adds up as fast as they come; scales and zero points in one piece with them.
        parts = [coded.weight, *(part for _, part in coded.named_buffers())]
        read.append(
            torch.cat([part.detach().contiguous().view(torch.int8).flatten() for part in parts]).view(torch.int64)
        )
    return lambda x: [words.sum() for words in read]


def bitsandbytes_nf4(threads: int) -> Engine:
    import bitsandbytes as bnb

    made = []
    for layer in stack():
        one = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        one.load_state_dict(layer.state_dict())
        made.append(one.to("cpu"))
    return nn.Sequential(*made)


def openvino_int4(threads: int) -> Engine:
    import numpy as np
    import openvino
    from openvino import opset13 as operators

    first = last = operators.parameter([-1, WIDTH], np.float32)
    for layer in stack():
        codes, scale = symmetric_codes(layer.weight, 128)
        words = (codes[..., ::2] | (codes[..., 1::2] << 4)).numpy()
        coded = openvino.Tensor(words, openvino.Shape(codes.shape), openvino.Type.u4)
        weight = operators.convert(operators.constant(coded), np.float32)
        centred = operators.subtract(weight, operators.constant(np.float32(8)))
        scaled = operators.multiply(centred, operators.constant(scale.numpy()))
        rows = operators.reshape(scaled, operators.constant([WIDTH, WIDTH]), special_zero=False)
        last = operators.matmul(last, rows, transpose_a=False, transpose_b=True)
    hints = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = openvino.Core().compile_model(openvino.Model([last], [first]), "CPU", hints)
    request = model.create_infer_request()
    return lambda x: request.infer([x.numpy()], share_inputs=True, share_outputs=True)


def symmetric_codes(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes 1 to 15 around 8, `(outputs, groups, group)`, and the scales, `(outputs, groups, 1)`."""
    groups = weight.detach().view(WIDTH, -1, group)
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return ((groups / scale).round() + 8).clamp(0, 15).to(torch.uint8), scale


def onnx_int4(threads: int) -> Engine:
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, tensors, block = [], [], 32
    layers = stack()
    for number, layer in enumerate(layers):
        codes, scale = symmetric_codes(layer.weight, block)
        data = (codes[..., ::2] | (codes[..., 1::2] << 4)).numpy()
        tensors += [
            helper.make_tensor(f"w{number}", TensorProto.UINT8, data.shape, data.tobytes(), raw=True),
            helper.make_tensor(
                f"s{number}", TensorProto.FLOAT, [scale.numel()], scale.numpy().astype(np.float32).tobytes(), raw=True
            ),
        ]
        fields = {"K": WIDTH, "N": WIDTH, "bits": 4, "block_size": block, "accuracy_level": 4}
        names = [f"x{number}", f"w{number}", f"s{number}"]
        nodes.append(helper.make_node("MatMulNBits", names, [f"x{number + 1}"], domain="com.microsoft", **fields))
    shape = ["batch", WIDTH]
    graph = helper.make_graph(
        nodes,
        "stack",
        [helper.make_tensor_value_info("x0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"x{len(layers)}", TensorProto.FLOAT, shape)],
        tensors,
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model), options)
    return lambda x: session.run(None, {"x0": x.numpy()})


ENGINES: dict[str, Maker] = {
    "torch fp32": fp32,
    "torch bf16": bf16,
    "fbgemm int8 (torch.ao quantize_dynamic)": fbgemm_int8,
    "llmcompress int8": int8,
    "llmcompress int4 (groups of 32)": partial(packed, Grid(4, 32), "int8"),
    "llmcompress int4 (groups of 128)": partial(packed, Grid(4, 128), "int8"),
    "llmcompress int4 (groups of 128; symmetric)": partial(packed, Grid(4, 128, symmetric=True), "int8"),
    "llmcompress int4 (groups of 128; one call)": partial(chained, Grid(4, 128)),
    "llmcompress int4 (groups of 128; symmetric; one call)": partial(chained, Grid(4, 128, symmetric=True)),
    "llmcompress nf4 (groups of 64)": partial(packed, Grid(4, 64, codebook="nf4"), "int8"),
    "llmcompress int3 (groups of 64)": partial(packed, Grid(3, 64), "int8"),
    "llmcompress int4 (groups of 64; compute='float')": partial(packed, Grid(4, 64), "float"),
    "read of the bytes of int4 (groups of 128)": plain_read,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "ONNX Runtime int4 (groups of 32)": onnx_int4,
    "OpenVINO int4 (groups of 128)": openvino_int4,
}


def main() -> None:
    arguments = command_line(__doc__, "batches", "1,4,32,128", "rows of the input")
    torch.manual_seed(0)
    inputs = {batch: torch.randn(int(batch), WIDTH) for batch in arguments.batches.split(",")}
    title = f"{LAYERS} linear layers of {WIDTH}x{WIDTH}; the columns are rows of the input"
    print_turns(title, ENGINES, inputs, arguments)


if __name__ == "__main__":
    main()
