"""One pass through 32 linear layers of 2048x2048, by everything that multiplies weights of few bits on this machine.

    python benchmarks/linear_stack.py --threads 1

All engines take turns in each round, so that a busy machine slows all of them alike; what counts is the ratio of the
medians. Prints Markdown.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable

import torch
from torch import nn

from _machine import describe_machine
from _turns import print_table, take_turns
from llmcompress.quantization.fitting import quantize
from llmcompress.quantization.grid import Grid
from llmcompress.quantization.modules import Int8Linear
from llmcompress.quantization.packed_modules import Compute, PackedLinear

LAYERS, WIDTH = 32, 2048
Engine = Callable[[torch.Tensor], object]


def fp32(layers: list[nn.Linear]) -> Engine:
    return nn.Sequential(*layers)


def bf16(layers: list[nn.Linear]) -> Engine:
    cast = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in layers))
    return lambda x: cast(x.bfloat16())


def int8(layers: list[nn.Linear]) -> Engine:
    return nn.Sequential(*(Int8Linear.from_float(layer) for layer in layers))


def fbgemm_int8(layers: list[nn.Linear]) -> Engine:
    return torch.ao.quantization.quantize_dynamic(nn.Sequential(*layers), {nn.Linear}, torch.qint8)


def packed(grid: Grid, compute: Compute) -> Callable[[list[nn.Linear]], Engine]:
    def make(layers: list[nn.Linear]) -> Engine:
        coded = (PackedLinear.from_coded(layer, quantize(layer.weight, grid), grid, compute) for layer in layers)
        return nn.Sequential(*coded)

    return make


def plain_read(layers: list[nn.Linear]) -> Engine:
    """Reads what int4 with groups of 128 has, and does nothing with it."""
    grid = Grid(4, 128)
    read = []
    for layer in layers:
        coded = PackedLinear.from_coded(layer, quantize(layer.weight, grid), grid)
        # As whole numbers, which torch adds up as fast as they come; scales and zero points in one piece with them.
        parts = [coded.weight, *(part for _, part in coded.named_buffers())]
        read.append(
            torch.cat([part.detach().contiguous().view(torch.int8).flatten() for part in parts]).view(torch.int64)
        )
    return lambda x: [words.sum() for words in read]


def bitsandbytes_nf4(layers: list[nn.Linear]) -> Engine:
    import bitsandbytes as bnb

    made = []
    for layer in layers:
        one = bnb.nn.Linear4bit(WIDTH, WIDTH, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        one.load_state_dict(layer.state_dict())
        made.append(one.to("cpu"))
    return nn.Sequential(*made)


def onnx_int4(layers: list[nn.Linear]) -> Engine:
    import numpy as np
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper

    nodes, tensors, block = [], [], 32
    for number, layer in enumerate(layers):
        groups = layer.weight.detach().view(WIDTH, -1, block)
        scale = groups.abs().amax(-1, keepdim=True) / 7
        codes = ((groups / scale).round() + 8).clamp(0, 15).to(torch.uint8)
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
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx.ModelProto.SerializeToString(model), options)
    return lambda x: session.run(None, {"x0": x.numpy()})


ENGINES: dict[str, Callable[[list[nn.Linear]], Engine]] = {
    "torch fp32": fp32,
    "torch bf16": bf16,
    "fbgemm int8 (torch.ao quantize_dynamic)": fbgemm_int8,
    "llmcompress int8": int8,
    "llmcompress int4 (groups of 32)": packed(Grid(4, 32), "int8"),
    "llmcompress int4 (groups of 128)": packed(Grid(4, 128), "int8"),
    "llmcompress int4 (groups of 128; symmetric)": packed(Grid(4, 128, symmetric=True), "int8"),
    "llmcompress nf4 (groups of 64)": packed(Grid(4, 64, codebook="nf4"), "int8"),
    "llmcompress int3 (groups of 64)": packed(Grid(3, 64), "int8"),
    "llmcompress int4 (groups of 64; compute='float')": packed(Grid(4, 64), "float"),
    "read of the bytes of int4 (groups of 128)": plain_read,
    "bitsandbytes nf4": bitsandbytes_nf4,
    "ONNX Runtime int4": onnx_int4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 32, 128])
    parser.add_argument("--engines", default="", help="comma-separated part of the engines; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
    chosen = [name for name in arguments.engines.split(",") if name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engines = {name: make(layers) for name, make in ENGINES.items() if not chosen or name in chosen}
    print(f"# {LAYERS} linear layers of {WIDTH}x{WIDTH}\n\n{describe_machine()}")
    print(f"- rounds: {arguments.rounds}, engines in turn, their order drawn anew each round\n")
    print(
        "Median milliseconds a pass [10th, 90th percentile]; speed relative to torch fp32; rows of the input on top.\n"
    )
    with torch.inference_mode():
        inputs = {str(batch): torch.randn(batch, WIDTH) for batch in arguments.batches}
        print_table({batch: take_turns(engines, x, arguments.rounds) for batch, x in inputs.items()})


if __name__ == "__main__":
    main()
