"""How fused projections order their rows, measured on the model itself instead of looked up by its name.

With one token, softmax has one key and is 1: what enters the output projection is the values themselves. So a fused
projection that is made to return its own row numbers shows, at the input of `o`, which rows are the values. A fused
gate and up projection that is made to return ones in two rows shows whether these two meet in one channel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .parts import GateUpLayout, QKVLayout
from .probe import probe_inputs

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

# Row numbers are sent through in two digits, each exact in bfloat16.
_DIGIT = 128


def qkv_layout(
    model: PreTrainedModel, qkv: nn.Module, o: nn.Module, *, heads: int, kv_heads: int, head_dim: int
) -> QKVLayout:
    """Find how the rows of `qkv` are ordered by following the value rows to the input of `o`."""
    if _on_meta(qkv):
        return "unknown"
    rows = torch.arange((heads + 2 * kv_heads) * head_dim)
    high, low = (_follow(model, qkv, o, digit.float()) for digit in (rows // _DIGIT, rows % _DIGIT))
    if high is None or low is None:
        return "unknown"
    values = (high * _DIGIT + low).round().long()
    group = heads // kv_heads
    head = torch.arange(heads).repeat_interleave(head_dim)
    within = torch.arange(head_dim).repeat(heads)
    expected: dict[QKVLayout, torch.Tensor] = {
        "[q|k|v]": (heads + kv_heads + head // group) * head_dim + within,
        "per head [q|k|v]": (3 * head + 2) * head_dim + within,
        "per group [q..|k|v]": ((head // group) * (group + 2) + group + 1) * head_dim + within,
    }
    return next((layout for layout, index in expected.items() if torch.equal(values, index)), "unknown")


def gate_up_layout(model: PreTrainedModel, gate_up: nn.Module, down: nn.Module, *, width: int) -> GateUpLayout:
    """Find which two rows of `gate_up` meet in one channel of the input of `down`."""
    if _on_meta(gate_up) or width < 3:
        return "unknown"
    channel = width // 2
    pairs: dict[GateUpLayout, tuple[int, int]] = {
        "[gate|up]": (channel, channel + width),
        "gate, up interleaved": (2 * channel, 2 * channel + 1),
    }
    for layout, pair in pairs.items():
        rows = torch.zeros(2 * width)
        rows[list(pair)] = 1
        arrived = _follow(model, gate_up, down, rows)
        if arrived is not None and arrived.nonzero().flatten().tolist() == [channel]:
            return layout
    return "unknown"


@torch.inference_mode()
def _follow(model: PreTrainedModel, source: nn.Module, sink: nn.Module, rows: torch.Tensor) -> torch.Tensor | None:
    """Run one token with `source` returning `rows`, and return what enters `sink`, or None if nothing does."""
    arrived: list[torch.Tensor] = []
    hooks = [
        source.register_forward_hook(lambda module, inputs, output: rows.to(output).expand_as(output).clone()),
        sink.register_forward_pre_hook(lambda module, inputs: arrived.append(inputs[0].detach())),
    ]
    training = model.training
    model.eval()
    try:
        model(**probe_inputs(model, rows=1, tokens=1))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return arrived[0].flatten().float().cpu() if arrived else None


def _on_meta(module: nn.Module) -> bool:
    return next(module.parameters()).device.type == "meta"
