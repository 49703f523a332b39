"""Where the repeated blocks of a model are: its largest ModuleLists of things that hold matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# A list that holds less than this share of the largest one's parameters is no stack of blocks (adapters, small heads).
_SMALLEST_SHARE = 0.05


@dataclass(frozen=True)
class Stack:
    """A `ModuleList` whose elements are the model's blocks.

    Attributes:
        path: its path in the model; `""` if the model itself is the list.
        blocks: the list.
    """

    path: str
    blocks: nn.ModuleList

    def __len__(self) -> int:
        return len(self.blocks)

    def block_path(self, index: int) -> str:
        """Return the path of block `index`."""
        return f"{self.path}.{index}" if self.path else str(index)


def find_stacks(model: nn.Module) -> list[Stack]:
    """Return the outermost ModuleLists whose elements hold at least two weight matrices each.

    An encoder-decoder model has two; blocks of several classes may take turns in one (attention and state-space
    layers). Small lists beside a large one are no stacks.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> tiny = BertConfig(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
        >>> [(stack.path, len(stack)) for stack in find_stacks(BertModel(tiny))]
        [('encoder.layer', 3)]
    """
    found: list[Stack] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(f"{outer.path}.") for outer in found):
            continue
        if len(module) and all(_matrices(child) >= 2 for child in module):
            found.append(Stack(path, module))
    largest = max((_parameters(stack) for stack in found), default=0)
    return [stack for stack in found if _parameters(stack) >= _SMALLEST_SHARE * largest]


def token_stacks(model: PreTrainedModel) -> list[Stack]:
    """Return the stacks that work on tokens: of a model that sees or hears as well, not those of its other towers.

    A tower is a part of its own class that says that it reads pixels or sounds, or whose config knows no vocabulary.
    Where all stacks are of this kind, all are returned.

    Example:
        >>> from llmcompress.testing import tiny_model
        >>> [stack.path for stack in token_stacks(tiny_model("t5"))]
        ['encoder.block', 'decoder.block']
    """
    stacks = find_stacks(model)
    return [stack for stack in stacks if _reads_tokens(model, stack.path)] or stacks


def _reads_tokens(model: PreTrainedModel, path: str) -> bool:
    from transformers import PreTrainedModel

    while path:
        path = path.rpartition(".")[0]
        owner = model.get_submodule(path)
        if isinstance(owner, PreTrainedModel):
            return owner.main_input_name == "input_ids" and hasattr(owner.config.get_text_config(), "vocab_size")
    return True


def _matrices(block: nn.Module) -> int:
    linear = sum(
        isinstance(module, (nn.Linear, Conv1D)) or hasattr(module, "in_features") for module in block.modules()
    )
    return linear + sum(parameter.dim() == 3 for parameter in block.parameters())


def _parameters(stack: Stack) -> int:
    tensors = (*stack.blocks.parameters(), *stack.blocks.buffers())
    return sum(tensor.numel() for tensor in tensors)
