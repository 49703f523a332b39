"""Half of a language model's depth: distilled, beside the same student trained on the same tokens without a teacher.

Both start from the same blocks of the teacher and see the same windows in the same order, at the same learning rate.
Scored on the first 60 windows of 256 tokens of tinystories, in nats a token (lower is better); trained on another part
of the same stories, and once more with tinyshakespeare mixed in half and half: text of another kind, on which the
teacher is asked all the same. The difference has a 95 % interval, paired by window (the seeds of a window are drawn
together). `--ways` names more: with texts that the teacher writes beforehand (sequence level), or the student as it
learns (on policy); both take longer.

    python benchmarks/distillation_lm.py --seeds 0 1 2 --threads 1 --assets FOLDER
"""

import argparse
import statistics
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from _machine import describe_machine
from _runs import Runs, Scores, difference
from _tinystories import loss, texts_of, token_ids, training_texts, window_losses

ROOT = Path(__file__).resolve().parent.parent

CORPORA = ["stories", "stories and Shakespeare"]
TAUGHT = {"alpha": 1.0, "temperature": 1.0, "features": {"hidden": 1.0}}
PLAIN = "trained without a teacher"
WAYS = {
    PLAIN: {"alpha": 0.0},
    "distilled": TAUGHT,
    "distilled, sequence level": TAUGHT | {"generation": lc.Generation(way="sequence", share=0.5)},
    "distilled, on policy": TAUGHT | {"generation": lc.Generation(way="on_policy", share=0.5)},
}


def corpora(assets: Path) -> dict[str, list[str]]:
    """Return what is trained on, by name, in texts of 2,000 characters."""
    stories = training_texts(assets)
    plays = (assets / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    texts = [plays[at : at + 2000] for at in range(0, len(plays), 2000)]
    mixed = list(chain.from_iterable(zip(stories, texts, strict=False)))
    return dict(zip(CORPORA, (stories, mixed), strict=True))


def pieces(texts: list[str], length: int = 250) -> list[str]:
    """Cut texts into what fits into one window: texts that are continued are read one by one, not joined."""
    return [text[at : at + length] for text in texts for at in range(0, len(text), length)]


def rows(found: dict[tuple[str, str], list[Scores]]) -> Iterator[str]:
    """Yield the lines of the table."""
    yield "| trained on | way | NLL of each seed | mean | difference to training without a teacher [95 %] |"
    yield "|---|---|---|---|---|"
    for (corpus, way), runs in found.items():
        means = [statistics.fmean(scores) for scores in runs]
        gain = ""
        if way != PLAIN and (corpus, PLAIN) in found:
            test = difference(runs, found[corpus, PLAIN])
            gain = f"{test.change:+.4f} [{test.low:+.4f}, {test.high:+.4f}]"
        each = ", ".join(f"{mean:.4f}" for mean in means)
        yield f"| {corpus} | {way} | {each} | {statistics.fmean(means):.4f} | {gain} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache", help="keeps finished runs")
    parser.add_argument("--model", default="babyllama-tok105-hf")
    parser.add_argument("--student", default="layers:0,4")
    parser.add_argument("--corpora", nargs="+", default=CORPORA, choices=CORPORA)
    parser.add_argument("--ways", nargs="+", default=list(WAYS)[:2], choices=list(WAYS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.assets / options.model
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = token_ids(tokenizer, texts_of(options.assets)[0])
    texts = corpora(options.assets)
    print(describe_machine())
    print(
        f"- teacher {loss(teacher, ids):.4f}; student {options.student}; {options.steps} steps of {options.batch} "
        f"windows of 256 tokens, learning rate {options.learning_rate:g}\n",
        flush=True,
    )
    runs = Runs(options.cache / "distillation-lm.jsonl")
    found: dict[tuple[str, str], list[Scores]] = {
        (corpus, way): [] for corpus in options.corpora for way in options.ways
    }
    for seed in options.seeds:
        for corpus, way in found:
            step = lc.KnowledgeDistillation(
                student=options.student,
                steps=options.steps,
                batch_size=options.batch,
                learning_rate=options.learning_rate,
                **WAYS[way],
            )

            def run(step: lc.KnowledgeDistillation = step, corpus: str = corpus, seed: int = seed) -> Scores:
                data = texts[corpus]
                if step.generation is not None:  # no more than are learned from: to write takes long
                    data = pieces(data)[: options.steps * options.batch]
                result = lc.compress(teacher, step, data=data, tokenizer=tokenizer, seed=seed, progress=False)
                return window_losses(result.model, ids)

            what = {"model": options.model, "step": str(step), "corpus": corpus, "seed": seed}
            found[corpus, way].append(runs.scores(what, run))
    print("\n".join(rows(found)))


if __name__ == "__main__":
    main()
