"""What `save_pretrained` writes of a model: the tensors by the names they get there, and the size of the file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The names of dtypes in a file, in the order in which safetensors lays tensors: the widest first, then by name.
DTYPE_NAMES = (
    (torch.uint64, "U64"), (torch.int64, "I64"), (torch.float64, "F64"), (torch.complex64, "C64"),
    (torch.float32, "F32"), (torch.uint32, "U32"), (torch.int32, "I32"), (torch.bfloat16, "BF16"),
    (torch.float16, "F16"), (torch.uint16, "U16"), (torch.int16, "I16"), (torch.float8_e4m3fn, "F8_E4M3"),
    (torch.float8_e5m2, "F8_E5M2"), (torch.int8, "I8"), (torch.uint8, "U8"), (torch.bool, "BOOL"),
)  # fmt: skip
_DTYPES = {dtype: (rank, name) for rank, (dtype, name) in enumerate(DTYPE_NAMES)}
_ALIGNED = 8


def saved_tensors(model: nn.Module | PreTrainedModel) -> dict[str, torch.Tensor]:
    """Return shapes and dtypes of what a folder of `model` holds, as tensors without content, by their names there.

    Tied weights come once, and where an architecture's folders have other names or other pieces than the model (one
    tensor an expert, of a 3-D weight), so has the result.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> found = saved_tensors(tiny_model("mixtral"))
        >>> found["model.layers.0.block_sparse_moe.experts.3.w2.weight"].shape
        torch.Size([64, 128])
    """
    from transformers import PreTrainedModel
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
    if not isinstance(model, PreTrainedModel):
        return _without_content(_once(state))
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    try:
        state = remove_tied_weights_from_state_dict(state, model)
    except RuntimeError:
        state = _once(state)  # tensors share memory in a way that no folder can hold: saving says so
    return revert_weight_conversion(model, _without_content(state))


def file_bytes(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return the size of the safetensors file with these `tensors`, its header included.

    Example:
        >>> from safetensors.torch import save
        >>> tensors = {"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.int8)}
        >>> file_bytes(tensors) == len(save(tensors, metadata={"format": "pt"}))
        True
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (_DTYPES[item[1].dtype][0], item[0].encode())):
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + -(-length // _ALIGNED) * _ALIGNED + offset


def _once(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out each tensor that shares the memory of an earlier one."""
    seen: dict[tuple[int, torch.Size, torch.dtype], str] = {}
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr() or id(tensor), tensor.shape, tensor.dtype), name)
    return {name: state[name] for name in seen.values()}


def _without_content(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
