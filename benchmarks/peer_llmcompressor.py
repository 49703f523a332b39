"""llm-compressor's own pruning, for `pruning_quality.py`: runs in an environment that has it, and prints JSON."""

import json
import sys
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from transformers import AutoModelForCausalLM

from _tinystories import loss

FIELDS = {
    "50 %": {"sparsity": 0.5},
    "60 %": {"sparsity": 0.6},
    "60 %, OWL": {"sparsity": 0.6, "sparsity_profile": "owl", "owl_m": 5, "owl_lmbda": 0.05},
    "2:4": {"sparsity": 0.5, "mask_structure": "2:4"},
    "4:8": {"sparsity": 0.5, "mask_structure": "4:8"},
}


def main(question: str) -> None:
    with open(question, encoding="utf-8") as file:
        asked = json.load(file)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in asked["calibration"]]
    ids = torch.tensor(asked["ids"])
    losses: dict[str, dict[str, float]] = {}
    for name, modifier in (("Wanda", WandaPruningModifier), ("SparseGPT", SparseGPTModifier)):
        losses[name] = {}
        for label, fields in FIELDS.items():
            model = AutoModelForCausalLM.from_pretrained(asked["model"]).eval()
            recipe = modifier(targets=["Linear"], ignore=["re:.*lm_head"], **fields)
            try:
                oneshot(
                    model=model,
                    dataset=Dataset.from_list(rows),
                    recipe=recipe,
                    num_calibration_samples=len(rows),
                    max_seq_length=256,
                )
            except Exception as error:
                print(f"{name}, {label}: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            losses[name][label] = loss(model, ids)
    print(json.dumps({"version": version("llmcompressor"), "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1])
