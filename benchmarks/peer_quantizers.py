"""llm-compressor's and HQQ's own quantization, for `quantization_quality.py`: runs in an environment that has them.

Asked with `{"model", "calibration", "ids", "group_size"}`, answers with JSON: by library, method and bits the loss in
nats a token, or `{"gptq_seconds_of": ...}` with the time of GPTQ on another model.
"""

import json
import sys
import time
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM

from _tinystories import loss


def llm_compressor(asked: dict, name: str, bits: int, symmetric: bool) -> tuple[torch.nn.Module, float]:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=symmetric, strategy="group", group_size=asked["group_size"]
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    modifier = {"RTN": QuantizationModifier, "GPTQ": GPTQModifier}[name]
    model = AutoModelForCausalLM.from_pretrained(asked["model"]).eval()
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in asked["calibration"]]
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=modifier(config_groups={"group_0": scheme}, ignore=["re:.*lm_head"]),
        num_calibration_samples=len(rows),
        max_seq_length=256,
    )
    return model, time.perf_counter() - start


def hqq(asked: dict, bits: int) -> torch.nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    model = AutoModelForCausalLM.from_pretrained(asked["model"]).eval()
    config = BaseQuantizeConfig(nbits=bits, group_size=asked["group_size"], axis=1)
    for path, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and path != "lm_head":
            layer = HQQLinear(module, config, compute_dtype=torch.float32, device="cpu", del_orig=False)
            module.weight.data = layer.dequantize()
    return model


def main(question: str) -> None:
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    torch.set_num_threads(asked["threads"])
    if asked.get("time_only"):
        _, seconds = llm_compressor(asked, "GPTQ", 4, False)
        print(json.dumps({"version": version("llmcompressor"), "seconds": seconds}))
        return
    ids = torch.tensor(asked["ids"])
    losses: dict[str, dict[str, float]] = {}
    for symmetric in (True, False):
        for name in ("RTN", "GPTQ"):
            label = f"llm-compressor {version('llmcompressor')} {name}, {'symmetric' if symmetric else 'asymmetric'}"
            losses[label] = {}
            for bits in asked["bits"]:
                try:
                    losses[label][str(bits)] = loss(llm_compressor(asked, name, bits, symmetric)[0], ids)
                except Exception as error:
                    print(f"{label}, {bits} bits: {type(error).__name__}: {error}", file=sys.stderr)
    label = f"HQQ {version('hqq')}"
    losses[label] = {}
    for bits in asked["bits"]:
        try:
            losses[label][str(bits)] = loss(hqq(asked, bits), ids)
        except Exception as error:
            print(f"{label}, {bits} bits: {type(error).__name__}: {error}", file=sys.stderr)
    print(json.dumps(losses))


if __name__ == "__main__":
    main(sys.argv[1])
