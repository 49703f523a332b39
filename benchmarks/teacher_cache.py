"""What students learn from a teacher's 64 likeliest tokens on disk, beside students that ask the teacher itself.

Prints the bytes that an answer takes, and of students of several seeds the NLL and the share of next tokens that they
get right. What the cache saves and costs is told by `distillation_speed.py`.

    python benchmarks/teacher_cache.py --model stories260K-hf --threads 1 --seeds 0 1 2
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import llmcompress as lc
from _machine import describe_machine
from _tinystories import loss, texts_of, token_ids, training_texts

ROOT = Path(__file__).resolve().parent.parent


@torch.inference_mode()
def right(model: PreTrainedModel, ids: torch.Tensor, *, window: int = 256, windows: int = 60) -> float:
    """Return the share of next tokens whose likeliest guess is right."""
    guesses = []
    for at in range(0, min(len(ids) - window, window * windows), window):
        tokens = ids[at : at + window][None]
        guesses.append((model(input_ids=tokens).logits[0, :-1].argmax(-1) == tokens[0, 1:]).float().mean().item())
    return statistics.fmean(guesses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--model", default="stories260K-hf")
    parser.add_argument("--student", default="layers:2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    folder = options.assets / options.model
    tokenizer, teacher = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    data = training_texts(options.assets)
    ids = token_ids(tokenizer, texts_of(options.assets)[0])
    print(describe_machine())
    print(
        f"- teacher {options.model}, vocabulary {teacher.config.vocab_size}: NLL {loss(teacher, ids):.4f}, right "
        f"{right(teacher, ids):.2%}; student {options.student}, {options.steps} steps of 16 windows of 256 tokens\n"
    )
    print("| seed | answers | NLL | next tokens right |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            for name, cache in {"live": None, "top 64": lc.TeacherCache(folder=folder)}.items():
                step = lc.KnowledgeDistillation(
                    student=options.student,
                    steps=options.steps,
                    alpha=1.0,
                    batch_size=16,
                    learning_rate=2e-3,
                    cache=cache,
                )
                result = lc.compress(teacher, step, data=data, tokenizer=tokenizer, seed=seed, progress=False)
                scores = f"{loss(result.model, ids):.4f} | {right(result.model, ids):.2%}"
                print(f"| {seed} | {name} | {scores} |", flush=True)
        told = next(action for action in result.report.steps[0].touched if "answers" in (action.does or ""))
        print(f"\nOn disk: {told.reason}.")


if __name__ == "__main__":
    main()
