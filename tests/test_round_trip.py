"""Every way of storing weights on every family: a fresh process gives the same logits; saved again, the same bytes."""

import json

import pytest
import torch

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.testing import FAMILIES, save_expected, tiny_data, tiny_model, tiny_tokenizer

# One model has layers of several widths: a pattern for each of its two blocks, the rest has `bits`.
_MIXED = {"*.0.*": 3, "*.1.*": 6}
SCHEMES = {
    "int8, a scale a token": lc.DynamicQuantization(activations="token"),
    "int8, stored scales": lc.StaticQuantization(samples=4),
    "fine zero points": lc.WeightOnlyQuantization(
        bits=2, fine_zeros=True, group_size=40, indivisible="pad", overrides=_MIXED, compute="float"
    ),
    "bfloat16, symmetric": lc.WeightOnlyQuantization(
        bits=8, symmetric=True, group_size=None, scale_dtype="bfloat16", overrides=_MIXED
    ),
    "nf4": lc.WeightOnlyQuantization(codebook="nf4", group_size=32),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_all_come_back_and_are_saved_again(family, reloads, tmp_path):
    for number, (name, step) in enumerate(SCHEMES.items()):
        model = tiny_model(family)
        if "bfloat16" in name:
            # Not by a cast, which rounds the frequencies of rotary positions too, as no loading does.
            model.save_pretrained(tmp_path / "float")
            model = type(model).from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
        context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer(), progress=False)
        model = step.compress(model, context).eval()
        first, second = tmp_path / f"{number}", tmp_path / f"{number}-again"
        model.save_pretrained(first)
        again = type(model).from_pretrained(first, dtype="auto").eval()
        again.save_pretrained(second)
        files = sorted(path.name for path in first.iterdir())
        assert files == sorted(path.name for path in second.iterdir())
        assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes(), name
        configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
        assert configs[0] == configs[1], name
        save_expected(model, first)
        reloads.append(first)
