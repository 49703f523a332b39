"""The whole job: data, teacher, three compressed versions, comparison, report, and the best one proven by reload."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from ..anatomy.stacks import find_stacks
from ..checkpoint import METADATA_FILE
from ..comparison import Comparison, compare
from ..compressor import Compressor, Context
from ..data import Example, load_examples
from ..distillation.distillation import KnowledgeDistillation
from ..errors import CompressionError, ConfigError, MissingInputError, NothingToCompressError, UnsupportedModelError
from ..evaluation.evaluate import Shape
from ..evaluation.inference import threads_set_to
from ..evaluation.tasks import TextClassification
from ..pipeline import compress
from ..pruning.structured import StructuredPruning
from ..pruning.vocabulary import VocabularyPruning
from ..quantization.dynamic import DynamicQuantization
from .docstrings import docstring_data
from .reload import Agreement, reload_agrees
from .teacher import class_names, encoder_folder, load_classifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..result import Result

KEEPS = 0.98
"""Share of the teacher's accuracy that the best model must keep."""

TEACHER = "teacher"
_STEPS = 7
_RELOADED_EXAMPLES = 200
_RECOVERY_EPOCHS = 1.0


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        comparison: teacher and compressed models, measured.
        report: the HTML page.
        best: name of the fastest model that keeps enough accuracy, or None.
        folder: where that model is, or None.
        agreement: the model in memory against its folder read in a fresh process, or None.
        reused: names of the models whose training was read from the cache.
    """

    comparison: Comparison
    report: Path
    best: str | None
    folder: Path | None
    agreement: Agreement | None
    reused: tuple[str, ...]


def run(
    *,
    model: str | Path | None = None,
    train: str | Path | None = None,
    test: str | Path | None = None,
    unlabelled: str | Path | None = None,
    out: str | Path = "demo-output",
    cache: str | Path | None = None,
    threads: int | None = None,
    seed: int = 0,
    train_examples: int = 300,
    test_examples: int = 120,
    unlabelled_examples: int = 700,
    teacher_epochs: float = 2.0,
    epochs: float = 2.0,
    max_length: int = 48,
    latency: bool | Sequence[Shape] = True,
    console: Console | None = None,
    progress: bool = True,
) -> Outcome:
    """Fine-tune a teacher, compress it in three ways, compare them, and save and prove the best one.

    Args:
        model: folder or hub name of an encoder or classifier; None takes the MiniLM encoder. A classifier of the data's
            classes is the teacher as it is.
        train: file or hub data set to train with; None takes docstrings of installed packages, and so for `test`.
        test: file or hub data set (its split `test`) to measure on.
        unlabelled: file or hub data set with more texts to distil with; labels in it are not looked at. Without it, the
            student learns from the teacher and the labels of `train`; with it from the teacher alone, on both.
        out: folder for `report.html` and the best model (`model`).
        cache: folder where finished training stages are kept for the next run; None takes the user's cache folder.
        threads: intra-op threads of torch; None leaves them.
        seed: seeds data, training and the teacher's new head.
        train_examples: docstrings of each package to train with.
        test_examples: docstrings of each package to measure on.
        unlabelled_examples: docstrings of each package, beyond those, to distil with; fewer where there are no more.
        teacher_epochs: passes over the data to fine-tune the teacher.
        epochs: passes over the data to distil the small student; the pruned one, which lost less, gets one of `train`.
        max_length: tokens a text is cut to, at least 2.
        latency: True, or the (rows, tokens) shapes to time; the first decides which model is the fastest.
        console: where to write; None takes the terminal.
        progress: whether bars are shown.

    Raises:
        CompressionError: one of its branches, before any training, where something is missing or out of range.
    """
    terminal = _Terminal(console or Console())
    out, cache = Path(out), Path(cache) if cache is not None else cache_folder()
    training: dict[str, Any] = {"max_length": max_length, "precision": "fp32"}
    fine_tune = KnowledgeDistillation(alpha=0.0, epochs=teacher_epochs, learning_rate=3e-4, **training)
    training["features"] = {"hidden": 1.0}
    recover = KnowledgeDistillation(epochs=_RECOVERY_EPOCHS, learning_rate=2e-4, **training)
    distil = KnowledgeDistillation(epochs=epochs, learning_rate=5e-4, batch_size=16, **training)
    _check_places(out, cache)
    source = Path(model) if model is not None else encoder_folder()
    reused = []

    with threads_set_to(threads):
        with terminal.step("Data" if train else "Data: docstrings, and which package each comes from"):
            examples, tests, texts = _data(
                train, test, unlabelled, (train_examples, test_examples, unlabelled_examples), seed
            )
            names = class_names(examples, tests)
            terminal.say(
                f"{len(examples)} to train, {len(tests)} to test, {len(texts)} more without labels, "
                f"{len(names)} classes: {escape(_listed(names))}"
            )
            task = TextClassification(tests, max_length=max_length)
            base, tokenizer, ready = load_classifier(model if model is not None else source, names, seed=seed)

        def trained(
            name: str, start: PreTrainedModel, steps: Sequence[Compressor], data: Sequence[Example] = examples
        ) -> Result:
            before = set(cache.iterdir()) if cache.is_dir() else set()
            keep = cache if any(isinstance(step, KnowledgeDistillation) for step in steps) else None
            # Most of a small encoder's weights are word embeddings, and most words never occur in so little data.
            start.get_input_embeddings().requires_grad_(False)
            result = compress(
                start, list(steps), data=data, tokenizer=tokenizer, seed=seed, resume_dir=keep, progress=progress
            )
            # Stages are named by a hash of all that they depend on: that none is new means that every one was found.
            if keep is not None and set(cache.iterdir()) == before:
                reused.append(name)
                terminal.say(f"trained by an earlier run, read from {cache}")
            return result

        with terminal.step(
            f"Teacher: {escape(source.name) if model is not None else 'MiniLM, 6 layers'}, "
            + ("a classifier already, as it is" if ready else "fine-tuned")
        ):
            teacher = base if ready else trained(TEACHER, base, [fine_tune]).model
        models: dict[str, Any] = {TEACHER: teacher}
        distil = distil.model_copy(update={"student": _student(teacher), "alpha": 1.0 if texts else 0.5})
        few, many = examples, [*examples, *texts]
        cut = _vocabulary(teacher, Context(data=many, tokenizer=tokenizer))
        if not cut:
            terminal.say("[yellow]the vocabulary stays:[/] the texts hold all of it, or its tokenizer cannot be cut")
        for name, (steps, data) in _chains(teacher, cut, recover, distil, few, many).items():
            with terminal.step(f"{name}: {' -> '.join(type(step).__name__ for step in steps)}"):
                try:
                    models[name] = trained(name, teacher, steps, data)
                except (NothingToCompressError, UnsupportedModelError) as error:
                    terminal.say(f"[yellow]left out:[/] {escape(str(error))}")
        with terminal.step("Compare"):
            comparison = compare(models, task, base=TEACHER, tokenizer=tokenizer, latency=latency, progress=progress)
            report = comparison.save(out / "report.html")
        terminal.show(str(comparison))

        with terminal.step("Save the best and read it back in a fresh process"):
            best = best_of(comparison)
            folder = agreement = None
            if best is None:
                terminal.say(
                    f"[yellow]no compressed model keeps {KEEPS:.0%} of the teacher's accuracy; none is saved[/]"
                )
                if (out / "model").exists():
                    terminal.say(f"[yellow]{out / 'model'} is of an earlier run[/]")
            else:
                folder = models[best].save_pretrained(out / "model")
                seen = tests[:: max(len(tests) // _RELOADED_EXAMPLES, 1)]
                kept = models[best]
                agreement = reload_agrees(kept.model, kept.tokenizer, folder, seen, max_length=max_length)
                terminal.say(
                    f"{best}: {agreement.equal} of {agreement.of} predictions equal, "
                    f"largest difference of a logit {agreement.largest:.1e}"
                )
    terminal.end(report, folder, cache)
    return Outcome(comparison, report, best, folder, agreement, tuple(reused))


def best_of(comparison: Comparison) -> str | None:
    """Return the name of the fastest candidate that keeps `KEEPS` of the base's accuracy, or None."""
    enough = KEEPS * comparison.base.evaluation.score.value
    good = [entry for entry in comparison.candidates if entry.evaluation.score.value >= enough]
    return min(good, key=lambda entry: entry.evaluation.latency[0].median_ms).name if good else None


def cache_folder() -> Path:
    """Return the user's cache folder for the demo: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmcompress" / "demo"


def _vocabulary(teacher: PreTrainedModel, context: Context) -> list[Compressor]:
    """Return the step that drops tokens which the texts never hold, or none where there is nothing for it to do."""
    step = VocabularyPruning()
    try:
        plan = step.plan(teacher, context)
    except UnsupportedModelError:
        return []
    return [step] if any(action.touched for action in plan) else []


def _chains(
    teacher: PreTrainedModel,
    cut: Sequence[Compressor],
    recover: KnowledgeDistillation,
    distil: KnowledgeDistillation,
    few: Sequence[Example],
    many: Sequence[Example],
) -> Mapping[str, tuple[Sequence[Compressor], Sequence[Example]]]:
    """Return each compressed version's steps and the data it is trained on."""
    half = StructuredPruning(ffn=0.5)
    kept, of = len(_kept_blocks(teacher)), _blocks(teacher)
    small = f"{'vocabulary, ' if cut else ''}half FFN, {kept} of {of} layers, int8"
    return {
        "int8": ([DynamicQuantization()], few),
        "half FFN": ([half, recover], few),
        small: ([*cut, half, distil, DynamicQuantization()], many),
    }


def _blocks(teacher: PreTrainedModel) -> int:
    return min((len(stack) for stack in find_stacks(teacher)), default=1)


def _kept_blocks(teacher: PreTrainedModel) -> Sequence[int]:
    """Every third block, from the first on: each does the work of three."""
    return range(0, _blocks(teacher), 3)


def _student(teacher: PreTrainedModel) -> str:
    return f"layers:{','.join(map(str, _kept_blocks(teacher)))},"


def _data(
    train: str | Path | None,
    test: str | Path | None,
    unlabelled: str | Path | None,
    counts: tuple[int, int, int],
    seed: int,
) -> tuple[list[Example], list[Example], list[Example]]:
    """Return examples to train with, to test on, and texts without labels."""
    if train is None and test is None and unlabelled is None:
        found = docstring_data(train=counts[0], test=counts[1], unlabelled=counts[2], seed=seed)
        return found.train, found.test, found.unlabelled
    if train is None or test is None:
        raise MissingInputError(f"--{'train' if train is None else 'test'} is missing; pass both --train and --test.")
    texts = _load(unlabelled, "unlabelled") if unlabelled is not None else []
    return _load(train, "train"), _load(test, "test"), [Example(text.text, text.pair) for text in texts]


def _load(source: str | Path, side: str) -> list[Example]:
    split = "train" if side == "unlabelled" else side
    try:
        return load_examples(source, split=split, name=f"--{side}")
    except CompressionError:
        raise
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise MissingInputError(f"--{side} {source} is no file and cannot be read from the hub: {lines[0]}") from error


def _check_places(out: Path, cache: Path) -> None:
    """Refuse, before minutes of work, a place where the results could not be written or drawn."""
    for folder, name in ((out, "--out"), (cache, "--cache")):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{name} must be a folder that can be made, got {folder}: {error.strerror}.") from error
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{name} must be a folder that can be written, got {folder}.")
    model = out / "model"
    if model.exists() and not (model / METADATA_FILE).is_file():
        raise ConfigError(f"{model} holds something that no demo wrote; move it away or choose another --out.")
    if find_spec("jinja2") is None:
        raise MissingInputError("the report needs jinja2, which is not installed; pip install 'llmcompress[report]'.")


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Terminal:
    """Numbered headings with the time that each step took, and the last lines."""

    def __init__(self, console: Console) -> None:
        self._console, self._number, self._start = console, 0, time.perf_counter()

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        self._number += 1
        self._console.print(f"[bold cyan]{self._number}/{_STEPS}[/] [bold]{title}[/]", highlight=False)
        start = time.perf_counter()
        yield
        self.say(f"[dim]{time.perf_counter() - start:.1f} s[/]")

    def say(self, text: str) -> None:
        self._console.print(f"    {text}", highlight=False, soft_wrap=True)

    def show(self, text: str) -> None:
        self._console.print(f"\n{text}\n", markup=False, highlight=False, soft_wrap=True)

    def end(self, report: Path, folder: Path | None, cache: Path) -> None:
        self._console.print(f"\n[bold green]done[/] in {time.perf_counter() - self._start:.0f} s", highlight=False)
        rows = {"report": report, "model": folder, "cache": f"{cache} (a second run reuses it; delete it at any time)"}
        for name, place in rows.items():
            if place is not None:
                self._console.print(f"  {name:<7}{place}", highlight=False, soft_wrap=True)
