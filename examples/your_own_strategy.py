"""A strategy of your own is one file: fields with ranges, a plan, the work, and one line that registers it."""

import torch
from pydantic import Field

import llmcompress as lc
from llmcompress.anatomy.layers import select


@lc.register("row_pruning")
class RowPruning(lc.Compressor):
    """Zero the outputs whose weights have the smallest norm, in each layer (Li et al., arXiv 1608.08710).

    Args:
        share: share of each layer's outputs that become zero, in (0, 1).
        targets: patterns of layer names; None takes every linear, Conv1D and expert weight of the blocks.
    """

    share: float = Field(0.25, gt=0, lt=1, description="share of each layer's outputs that become zero")
    targets: tuple[str, ...] | None = Field(None, description="patterns of layer names; None: all in the blocks")

    def plan(self, model, context):
        """Name the layers that lose rows, and say why each other one is left."""
        layers, left = select(model, who="RowPruning", targets=self.targets)
        return [lc.Action(path=layer.name, does=f"{self.share:.0%} of the outputs zero") for layer in layers] + left

    @torch.no_grad()
    def compress(self, model, context):
        """Write the zeros in place: the runner made the copy, and measures what came of it."""
        for layer in select(model, who="RowPruning", targets=self.targets)[0]:
            norms = layer.weight.float().norm(dim=layer.input_axis, keepdim=True)
            layer.weight.mul_(norms > norms.quantile(self.share))
        return model


if __name__ == "__main__":
    from llmcompress.testing import tiny_model

    print(lc.compress(tiny_model("gpt2"), {"name": "row_pruning", "share": 0.5}))
