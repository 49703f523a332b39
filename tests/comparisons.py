"""A comparison with every part filled in, made by hand: no model runs."""

from __future__ import annotations

import random

from llmcompress.anatomy.footprint import Footprint
from llmcompress.comparison import Change, Comparison, Entry
from llmcompress.evaluation.evaluate import Evaluation
from llmcompress.evaluation.fidelity import Fidelity
from llmcompress.evaluation.latency import Latency, Speedup
from llmcompress.evaluation.machine import Machine
from llmcompress.evaluation.size import Size
from llmcompress.evaluation.statistics import PairedTest, flips, paired_proportions, wilson
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.result import Report, StepRecord

NASTY = '<script>alert("1")</script> | *x* $y$'
CLASSES = ("argparse", "asyncio", "collections", "email", "numpy", "torch", "transformers", "unittest")
MACHINE = Machine(
    cpu="Test CPU",
    cpu_flags=("avx2", "avx512_vnni"),
    physical_cores=2,
    logical_cores=2,
    memory_bytes=8 * 2**30,
    gpu=None,
    system="Linux x86_64",
    python="3.11",
    torch="2.13",
    transformers="5.23",
)


def latency(median: float, batch_size: int = 1, dtype: str = "float32") -> Latency:
    return Latency(
        batch_size=batch_size,
        tokens=128,
        median_ms=median,
        mean_ms=median * 1.02,
        p90_ms=median * 1.1,
        p99_ms=median * 1.3,
        tokens_per_second=batch_size * 128 / median * 1000,
        repeats=120,
        warmup=3,
        threads=2,
        dtype=dtype,
        device="cpu",
        turns_ms=(median,) * 10,
    )


def score(accuracy: float, *, examples: int = 1200, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> TaskScore:
    chance = random.Random(seed)
    results = []
    for index in range(examples):
        label = index % len(classes)
        hit = chance.random() < accuracy
        prediction = label if hit else (label + 1) % len(classes)
        results.append(
            ExampleResult(values={"accuracy": float(hit)}, label=label, prediction=prediction, confidence=0.9)
        )
    hits = sum(result.values["accuracy"] for result in results)
    return TaskScore(
        task="text_classification",
        metrics={"accuracy": hits / examples},
        primary="accuracy",
        kinds={"accuracy": MetricKind()},
        intervals={"accuracy": wilson(int(hits), examples)},
        classes=classes,
        examples=tuple(results),
        protocol={"examples": examples, "batch_size": 32},
    )


def fidelity(**changed: object) -> Fidelity:
    found = {
        "answers": 1200,
        "kl_mean": 0.02,
        "kl_median": 0.01,
        "kl_p99": 0.3,
        "top1_agreement": 0.97,
        "cosine": 0.99,
        "entropy_base": 1.2,
        "entropy": 1.1,
        "most_frequent": 0.2,
    }
    return Fidelity.model_validate(found | changed)


def run(megabytes: float, nonzero: float, *steps: dict[str, object]) -> Report:
    """A run whose steps shrink the model by equal factors from 90.9 MB to `megabytes`, losing 1 point at each."""
    factor = (megabytes / 90.9) ** (1 / len(steps))
    sizes = [90.9 * factor**number for number in range(1, len(steps) + 1)]
    prints = [
        Footprint(parameters=22_700_000, nonzero=int(nonzero * 1e6), memory_bytes=int(s * 1e6), disk_bytes=int(s * 1e6))
        for s in sizes
    ]
    base = Footprint(parameters=22_700_000, nonzero=22_700_000, memory_bytes=90_900_000, disk_bytes=90_900_000)
    return Report(
        model="BertForSequenceClassification",
        recipe={"name": "pipeline", "steps": list(steps)},
        seed=0,
        versions={},
        base=base,
        base_score=score(0.93, examples=40),
        steps=[
            StepRecord(step=step, seconds=1.5, footprint=size, touched=[], left=[], score=score(0.9, examples=40))
            for step, size in zip(steps, prints, strict=True)
        ],
    )


def entry(
    name: str,
    accuracy: float,
    megabytes: float,
    milliseconds: float,
    nonzero: float,
    base: Entry | None,
    *,
    seed: int = 0,
    steps: tuple[dict[str, object], ...] = (),
    dtype: str = "float32",
    collapse: str | None = None,
    classes: tuple[str, ...] = CLASSES,
) -> Entry:
    evaluation = Evaluation(
        model="BertForSequenceClassification",
        scores=(score(accuracy, seed=seed, classes=classes),),
        size=Size(
            parameters=22_700_000,
            nonzero=int(nonzero * 1e6),
            memory_bytes=int(megabytes * 1.01e6),
            disk_bytes=int(megabytes * 1e6),
            from_files=True,
        ),
        latency=(latency(milliseconds, dtype=dtype), latency(milliseconds * 6.5, batch_size=8, dtype=dtype)),
        machine=MACHINE,
    )
    if base is None:
        return Entry(name=name, evaluation=evaluation, change=None)
    ours, theirs = base.evaluation, evaluation
    right = [found.score.right for found in (ours, theirs)]
    same = [a.prediction == b.prediction for a, b in zip(ours.score.examples, theirs.score.examples, strict=True)]
    ratios = [a.median_ms / b.median_ms for a, b in zip(ours.latency, theirs.latency, strict=True)]
    change = Change(
        tests=((paired_proportions("accuracy", right[0], right[1]),),),
        flips=(flips(right[0], right[1], same),),
        fidelity=(fidelity(collapse=collapse),),
        smaller_on_disk=ours.size.disk_bytes / theirs.size.disk_bytes,
        smaller_in_memory=ours.size.memory_bytes / theirs.size.memory_bytes,
        fewer_weights=ours.size.nonzero / theirs.size.nonzero,
        faster=tuple(
            Speedup(batch_size=batch, tokens=128, ratio=ratio, low=ratio * 0.97, high=ratio * 1.03)
            for batch, ratio in zip((1, 8), ratios, strict=True)
        ),
    )
    report = run(megabytes, nonzero, *steps) if steps else None
    return Entry(name=name, evaluation=evaluation, change=change, report=report)


def comparison(nasty: str = NASTY) -> Comparison:
    classes = (nasty, *CLASSES[1:])
    base = entry("teacher", 0.93, 90.9, 48.0, 22.7, None, classes=classes)
    chain = ({"name": "structured_pruning", "ffn": 0.3}, {"name": "dynamic_quantization"})
    entries = (
        base,
        entry("int8", 0.928, 23.1, 19.5, 22.7, base, seed=1, classes=classes),
        entry(nasty, 0.916, 8.2, 9.1, 7.9, base, seed=2, classes=classes, steps=chain),
        entry("bnb-nf4", 0.92, 51.0, 118.0, 22.7, base, seed=3, steps=({"name": "bitsandbytes_quantization"},)),
        entry("magnitude 50 %", 0.86, 90.9, 48.2, 11.4, base, seed=4, steps=({"name": "magnitude_pruning"},)),
    )
    texts = tuple(f"text {number} {nasty}" for number in range(1200))
    return Comparison(created="2026-11-24T01:00:00+00:00", entries=entries, inputs=(texts,), machine=MACHINE)


def of_scores(base: TaskScore, candidate: TaskScore, *tests: PairedTest, texts: tuple[str, ...] = ()) -> Comparison:
    """Two models that differ in nothing but their answers."""
    size = Size(parameters=10, nonzero=10, memory_bytes=40, disk_bytes=40, from_files=False)
    ours, theirs = (Evaluation(model="Toy", scores=(found,), size=size, machine=MACHINE) for found in (base, candidate))
    change = Change(
        tests=(tests,),
        flips=(None,),
        fidelity=(None,),
        smaller_on_disk=1.0,
        smaller_in_memory=1.0,
        fewer_weights=1.0,
        faster=(),
    )
    entries = (Entry(name="base", evaluation=ours, change=None), Entry(name="other", evaluation=theirs, change=change))
    return Comparison(created="2026-11-24T01:00:00+00:00", entries=entries, inputs=(texts,), machine=MACHINE)
