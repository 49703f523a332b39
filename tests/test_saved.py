"""The bytes told are the bytes of the file, to the last one, whatever names and pieces a folder has."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForPreTraining

import llmcompress as lc
from llmcompress.anatomy.footprint import disk_bytes
from llmcompress.anatomy.saved import file_bytes, saved_tensors
from llmcompress.support.tiny_models import build_tiny
from llmcompress.testing import FAMILIES, IMAGE_FAMILIES, tiny_model


def written(model, folder):
    model.save_pretrained(folder)
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("family", [*FAMILIES, *IMAGE_FAMILIES])
def test_bytes_of_every_family_and_width(family, tmp_path):
    model = tiny_model(family)
    assert disk_bytes(model) == written(model, tmp_path / "float32")
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert disk_bytes(half) == written(half, tmp_path / "bfloat16")
    int8 = lc.DynamicQuantization().compress(model, lc.Context())
    assert disk_bytes(int8) == written(int8, tmp_path / "int8")


# Ties the other way round; experts of many kinds; a head of two parts.
@pytest.mark.parametrize("architecture", ["camembert", "gpt_oss", "deepseek_v3", "jetmoe", "ernie4_5_moe", "rwkv"])
def test_bytes_of_unusual_folders(architecture, tmp_path):
    model = build_tiny("causal-lm", architecture)
    assert disk_bytes(model) == written(model, tmp_path / "float")
    int8 = lc.DynamicQuantization().compress(model, lc.Context())
    assert disk_bytes(int8) == written(int8, tmp_path / "int8")


@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("family", ["bert", "mixtral"])
def test_bytes_of_bitsandbytes(family, kind, tmp_path):
    pytest.importorskip("bitsandbytes")
    step = lc.BitsAndBytesQuantization(kind=kind, double_quant=kind == "nf4")
    model = step.compress(tiny_model(family), lc.Context())
    assert disk_bytes(model) == written(model, tmp_path)


def test_names_are_those_of_the_folder_and_no_memory_is_taken():
    found = saved_tensors(tiny_model("mixtral"))
    assert "model.layers.1.block_sparse_moe.experts.3.w1.weight" in found
    assert all(tensor.is_meta for tensor in found.values())
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tied = saved_tensors(BertForPreTraining(BertConfig(**sizes, intermediate_size=64)))
    assert "cls.predictions.decoder.weight" not in tied


def test_a_module_of_no_architecture_counts_shared_tensors_once():
    layer = nn.Linear(8, 8)
    both = nn.ModuleDict({"a": layer, "b": nn.Linear(8, 8)})
    both["b"].weight = layer.weight
    assert list(saved_tensors(both)) == ["a.weight", "a.bias", "b.bias"]
    assert file_bytes({}) == 8 + 32
