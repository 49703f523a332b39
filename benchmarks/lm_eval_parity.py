"""Multiple choice beside lm-eval, on ARC-Easy: `python benchmarks/lm_eval_parity.py`.

lm-eval runs the same questions by itself, as a task of its own on a local file. Prints, for each model, both
accuracies of both, the largest difference of any log-likelihood, and what both took; Markdown.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import llmcompress as lc
from _machine import describe_machine
from llmcompress.evaluation.tasks.forward import advance

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
TASK = """
task: parity
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{file}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--questions", type=Path, default=ASSETS / "mcq" / "ARC-Easy.test.json")
    parser.add_argument("--model", type=Path, default=ASSETS / "stories260K-hf", help="a causal model with tokenizer")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    rows = read_questions(arguments.questions)[: arguments.limit]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    print(f"# Multiple choice beside lm-eval {lm_eval.__version__}: {len(rows)} questions\n\n{describe_machine()}\n")
    print("| model | accuracy | lm-eval acc | accuracy_norm | lm-eval acc_norm | largest difference | ours | lm-eval |")
    print("|---|---|---|---|---|---|---|---|")
    for name, model in models(arguments.model, len(tokenizer)):
        start = time.perf_counter()
        score, ours = by_us(model, tokenizer, rows, arguments.batch_size)
        middle = time.perf_counter()
        metrics, theirs = by_lm_eval(model, tokenizer, rows, arguments.batch_size)
        end = time.perf_counter()
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        numbers = (score["accuracy"], metrics["acc,none"], score["accuracy_norm"], metrics["acc_norm,none"])
        told = " | ".join(f"{number:.4f}" for number in numbers)
        print(f"| {name} | {told} | {apart:.1e} nats | {middle - start:.1f} s | {end - middle:.1f} s |")


def read_questions(path: Path) -> list[dict[str, object]]:
    """Read questions whose choices stand inside the prompt."""
    found: list[dict[str, object]] = []
    for row in json.loads(path.read_text()):
        question, choices, _ = row["instruction"].split(": ", 1)[1].rsplit("\n\n", 2)
        texts = re.split(r" ?Answer\d+: ", choices)[1:]
        found.append({"question": question, "choices": texts, "answer": int(row["answer"].removeprefix("answer")) - 1})
    return found


def models(folder: Path, vocabulary: int) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield the trained model, and random ones of MiniLM's size: six layers, 384 wide."""
    yield folder.name, AutoModelForCausalLM.from_pretrained(folder).eval()
    torch.manual_seed(0)
    spread = {"vocab_size": vocabulary, "initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2}
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    yield "random Llama, 6 x 384", LlamaForCausalLM(LlamaConfig(**spread, **sizes, max_position_embeddings=512)).eval()
    sizes = {"n_embd": 384, "n_layer": 6, "n_head": 12, "n_positions": 512}
    yield "random GPT-2, 6 x 384", GPT2LMHeadModel(GPT2Config(**spread, **sizes)).eval()


def by_us(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, object]], batch_size: int
) -> tuple[dict[str, float], list[float]]:
    run = lc.MultipleChoice(rows).start(model, tokenizer, batch_size=batch_size)
    advance({"model": run}, title="", progress=False)
    return run.score().metrics, [value for values in run.loglikelihoods for value in values]


def by_lm_eval(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, object]], batch_size: int
) -> tuple[dict[str, float], list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "rows.json"
        data.write_text(json.dumps(rows))
        (Path(folder) / "parity.yaml").write_text(TASK.format(file=data))
        index = TaskManager(include_path=folder, include_defaults=False)
        runner = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=runner, tasks=["parity"], task_manager=index, bootstrap_iters=0)
    samples = sorted(found["samples"]["parity"], key=lambda sample: sample["doc_id"])
    return found["results"]["parity"], [float(value) for sample in samples for value, _ in sample["filtered_resps"]]


if __name__ == "__main__":
    main()
