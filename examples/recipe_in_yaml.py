"""A recipe in YAML: written, kept in version control, read back as an equal pipeline, and run."""

from pathlib import Path

import llmcompress as lc
from llmcompress.testing import tiny_model

steps = [lc.StructuredPruning(ffn=0.25), lc.MagnitudePruning(sparsity=0.3), "dynamic_quantization"]
pipeline = lc.Pipeline(steps=steps)
pipeline.to_yaml("recipe.yaml")
print(Path("recipe.yaml").read_text())

again = lc.Pipeline.from_yaml("recipe.yaml")
print("equal:", again == pipeline)

# Yours: any AutoModel...from_pretrained(...). A recipe knows no model: the same file serves the next one.
print(lc.compress(tiny_model("qwen3"), again))

# A recipe that cannot work is refused before any work, with what to do about it.
try:
    lc.Pipeline(steps=["dynamic_quantization", "magnitude_pruning"]).flatten()
except lc.PipelineOrderError as error:
    print(error)
