"""The renderings of one comparison: nothing is lost, nothing is markup, nothing is fetched."""

from __future__ import annotations

import random
import re
from html.parser import HTMLParser

import pytest

from llmcompress.comparison import Change, Comparison, Entry
from llmcompress.errors import ConfigError
from llmcompress.evaluation.evaluate import Evaluation, Size
from llmcompress.evaluation.latency import Latency, Speedup
from llmcompress.evaluation.machine import Machine
from llmcompress.evaluation.statistics import flips, paired_proportions, wilson
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.report.findings import headline, notes, size_text, speed_text
from llmcompress.report.plots import Point, pareto_front, scatter

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


def latency(median: float, batch_size: int = 1) -> Latency:
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
        dtype="float32",
        device="cpu",
        turns_ms=(median,) * 10,
    )


def score(accuracy: float, *, examples: int = 1200, seed: int = 0) -> TaskScore:
    chance = random.Random(seed)
    results = []
    for index in range(examples):
        label = index % len(CLASSES)
        hit = chance.random() < accuracy
        prediction = label if hit else (label + 1) % len(CLASSES)
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
        classes=CLASSES,
        examples=tuple(results),
        protocol={"examples": examples, "batch_size": 32},
    )


def entry(
    name: str, accuracy: float, megabytes: float, milliseconds: float, nonzero: float, base: Entry | None, seed: int = 0
) -> Entry:
    evaluation = Evaluation(
        model="BertForSequenceClassification",
        scores=(score(accuracy, seed=seed),),
        size=Size(
            parameters=22_700_000,
            nonzero=int(nonzero * 1e6),
            memory_bytes=int(megabytes * 1.01e6),
            disk_bytes=int(megabytes * 1e6),
            from_files=True,
        ),
        latency=(latency(milliseconds), latency(milliseconds * 6.5, batch_size=8)),
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
        fidelity=(None,),
        smaller_on_disk=ours.size.disk_bytes / theirs.size.disk_bytes,
        smaller_in_memory=ours.size.memory_bytes / theirs.size.memory_bytes,
        fewer_weights=ours.size.nonzero / theirs.size.nonzero,
        faster=tuple(
            Speedup(batch_size=batch, tokens=128, ratio=ratio, low=ratio * 0.97, high=ratio * 1.03)
            for batch, ratio in zip((1, 8), ratios, strict=True)
        ),
    )
    return Entry(name=name, evaluation=evaluation, change=change)


def comparison(nasty: str = NASTY) -> Comparison:
    base = entry("teacher", 0.93, 90.9, 48.0, 22.7, None)
    entries = (
        base,
        entry("int8", 0.928, 23.1, 19.5, 22.7, base, seed=1),
        entry(nasty, 0.916, 8.2, 9.1, 7.9, base, seed=2),
        entry("bnb-nf4", 0.92, 51.0, 118.0, 22.7, base, seed=3),
        entry("magnitude 50 %", 0.86, 90.9, 48.2, 11.4, base, seed=4),
    )
    return Comparison(created="2026-11-24T01:00:00+00:00", entries=entries, machine=MACHINE)


class Page(HTMLParser):
    """Collects what a browser would run or fetch, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in {"src", "href", "xlink:href"} or name[:2] == "on"
        ]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return comparison().to_html()


def test_html_runs_and_fetches_nothing_and_shows_a_nasty_name_as_it_is(page: str) -> None:
    parsed = Page()
    parsed.feed(page)
    assert "script" not in parsed.tags
    assert all(link.startswith("#") for link in parsed.links)
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    text = "".join(parsed.shown)
    assert text.count(NASTY) >= 6  # card, tables, plots


def test_html_has_every_model_in_both_plots_with_ids_of_their_own(page: str) -> None:
    drawings = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(drawings) == 2
    for drawing in drawings:
        for name in ("teacher", "int8", "bnb-nf4", "magnitude 50 %"):
            assert f">{name}</text>" in drawing
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert not re.search(r"#0102\d\d", page)  # matplotlib's stand-in colours are all replaced


def test_json_is_the_whole_comparison(tmp_path) -> None:
    found = comparison()
    assert Comparison.from_json(found.to_json()) == found
    assert Comparison.from_json(found.save(tmp_path / "deep" / "report.json").read_text()) == found


def test_markdown_escapes_names_and_keeps_its_columns(tmp_path) -> None:
    text = comparison().save(tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 5
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(re.findall(r"(?<!\\)\|", rows[0]))}
    assert "<script>" not in text
    assert "- int8: 3.9x smaller, 2.5x faster, accuracy" in text


def test_terminal_shows_brackets_and_tags_as_text() -> None:
    text = str(comparison("[bold]x[/bold]"))
    assert text.count("[bold]x[/bold]") >= 2
    assert "teacher" in text


def test_notebook_table_is_escaped() -> None:
    found = comparison()._repr_html_()
    assert "<script>" not in found
    assert "&lt;script&gt;" in found


def test_save_refuses_other_endings_and_leaves_no_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"\.html, \.md, \.json"):
        comparison().save(tmp_path / "report.pdf")
    assert list(tmp_path.iterdir()) == []


def test_headline_and_notes_say_slower_and_say_what_zeros_do_not_save() -> None:
    found = comparison()
    said = headline(found, found["bnb-nf4"])
    assert said.startswith("1.8x smaller, 2.5x slower, accuracy -")
    told = "\n".join(notes(found))
    assert "bnb-nf4 is slower than teacher on this CPU: 0.41x at 1x128 tokens" in told
    assert "magnitude 50 % has 50% zeros" in told
    assert "magnitude 50 % is no faster than teacher" in told
    assert "int8 is no faster" not in told
    assert "more than chance" in next(line for line in told.splitlines() if line.startswith("magnitude 50 %: accuracy"))


@pytest.mark.parametrize(
    ("ratio", "size", "speed"),
    [
        (1.0, "same size", "same speed"),
        (1.04, "same size", "same speed"),
        (0.5, "2.0x larger", "2.0x slower"),
        (12.4, "12x smaller", "12x faster"),
    ],
)
def test_ratios_in_words(ratio: float, size: str, speed: str) -> None:
    assert (size_text(ratio), speed_text(ratio)) == (size, speed)


def test_pareto_front_of_hand_cases() -> None:
    points = [Point("a", 4, 0.9), Point("b", 1, 0.8), Point("c", 2, 0.8), Point("d", 2, 0.85), Point("e", 5, 0.9)]
    assert [point.name for point in pareto_front(points, higher_is_better=True)] == ["b", "d", "a"]
    assert [point.name for point in pareto_front(points, higher_is_better=False)] == ["b"]


def test_plot_does_not_read_a_name_as_mathematics_or_markup() -> None:
    points = [Point(r"$\frac{1}{$ <b>", 2.0, 0.5), Point("z", 1.0, 0.4)]
    svg = scatter(
        points,
        cost="size",
        quality="accuracy",
        higher_is_better=True,
        cost_text=str,
        quality_text=str,
        prefix="p",
    )
    assert r"$\frac{1}{$ &lt;b&gt;" in svg
