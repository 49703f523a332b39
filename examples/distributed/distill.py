"""Distil a language model to some of its layers, in one process or in many: see launch.sh and slurm.sh beside it."""

import argparse
import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="folder or hub name of the teacher")
    parser.add_argument("texts", help="file with texts, such as texts.txt")
    parser.add_argument("out", help="folder for the student")
    parser.add_argument("--student", default="layers:6", help="what of the teacher stays")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8, help="rows a step and process")
    parser.add_argument("--max-length", type=int, default=512)
    given = parser.parse_args()

    first = os.environ.get("RANK", "0") == "0"
    model = AutoModelForCausalLM.from_pretrained(given.model)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    if torch.cuda.is_available():
        model = model.to(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
    step = lc.KnowledgeDistillation(
        student=given.student,
        alpha=0.8,
        steps=given.steps,
        batch_size=given.batch_size,
        max_length=given.max_length,
        gradient_checkpointing=True,
    )
    # A job that is killed goes on from its last checkpoint when it is started again; one that FSDP shards begins anew.
    stages = f"{given.out}.stages"
    result = lc.compress(model, step, data=given.texts, tokenizer=tokenizer, resume_dir=stages, progress=first)
    if first:
        result.save_pretrained(given.out)
        print(result)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
