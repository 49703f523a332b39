"""torch's default dtype is the caller's business: whatever it is, a float32 model is compressed to the same weights."""

from contextlib import contextmanager

import pytest
import torch

import llmcompress as lc
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

STEPS = {
    "magnitude": lc.MagnitudePruning(),
    "wanda": lc.WandaPruning(),
    "sparsegpt": lc.SparseGPTPruning(),
    "structured by norms": lc.StructuredPruning(ffn=0.5),
    "structured by inputs": lc.StructuredPruning(ffn=0.5, importance="activation"),
    "structured by gradients": lc.StructuredPruning(ffn=0.5, importance="taylor"),
    "depth": lc.DepthPruning(ratio=0.5),
    "dynamic": lc.DynamicQuantization(),
    "smoothed": lc.DynamicQuantization(smooth=0.5),
    "static": lc.StaticQuantization(),
    "rounded": lc.WeightOnlyQuantization(group_size=32),
    "clipped": lc.WeightOnlyQuantization(group_size=32, fit="mse", symmetric=True),
    "half-quadratic": lc.WeightOnlyQuantization(group_size=32, fit="hqq"),
    "nf4": lc.WeightOnlyQuantization(group_size=32, codebook="nf4"),
    "auto": lc.WeightOnlyQuantization(group_size=32, bits="auto", target_bits=5),
    "gptq": lc.GPTQ(group_size=32),
    "awq": lc.AWQ(group_size=32),
    "distillation": lc.KnowledgeDistillation(steps=2, features={"hidden": 1.0}),
}


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("name", STEPS)
def test_the_same_weights_under_another_default_dtype(name):
    model, data = tiny_model("llama"), tiny_data(tiny_model("llama"))
    expected = lc.compress(model, STEPS[name], data=data, tokenizer=tiny_tokenizer(), progress=False).model
    with default_dtype(torch.bfloat16):
        found = lc.compress(model, STEPS[name], data=data, tokenizer=tiny_tokenizer(), progress=False).model
        inputs = torch.arange(8)[None]
        with torch.no_grad():
            logits = found(inputs).logits
    with torch.no_grad():
        assert torch.equal(logits, expected(inputs).logits)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[key], tensor), key
