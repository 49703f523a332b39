"""What a report says and draws: words, reasons, classes, examples, stages, plots; each by hand-made cases."""

from __future__ import annotations

import random
import re

import pytest

from comparisons import CLASSES, MACHINE, comparison, entry, of_scores
from llmcompress.comparison import Comparison
from llmcompress.evaluation.statistics import PairedTest
from llmcompress.evaluation.table import Table
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.report.classes import commonest_confusions, confusions, recalls
from llmcompress.report.examples import MOST_SHOWN, differences, marked
from llmcompress.report.findings import effect_text, evidence, headline, notes, size_text, speed_text
from llmcompress.report.labels import Box, place
from llmcompress.report.plots import Axis, Point, pareto_front, scatter
from llmcompress.report.reasons import why_no_faster
from llmcompress.report.waterfall import waterfalls


def paired(change: float, low: float, high: float, *, scale: str = "points", p: float = 0.5) -> PairedTest:
    return PairedTest.model_validate(
        {
            "metric": "m",
            "scale": scale,
            "change": change,
            "low": low,
            "high": high,
            "p_value": p,
            "p_holm": min(1.0, 2 * p),
            "method": "paired bootstrap",
            "detectable": None,
            "units": 30,
        }
    )


def answers(
    *pairs: tuple[object, object],
    metric: str = "accuracy",
    task: str = "toy",
    classes: tuple[str, ...] | None = None,
    values: tuple[float, ...] | None = None,
) -> TaskScore:
    """A score of (label, prediction) pairs, right where the two are equal unless `values` says otherwise."""
    results = [
        ExampleResult(values={metric: values[at] if values else float(label == given)}, label=label, prediction=given)
        for at, (label, given) in enumerate(pairs)
    ]
    return TaskScore(
        task=task,
        metrics={metric: 0.5},
        kinds={metric: MetricKind()},
        primary=metric,
        classes=classes,
        examples=tuple(results),
        protocol={},
    )


class TestWords:
    @pytest.mark.parametrize(
        ("ratio", "size", "speed"),
        [
            (1.0, "same size", "same speed"),
            (1.04, "same size", "same speed"),
            (0.5, "2.0x larger", "2.0x slower"),
            (12.4, "12x smaller", "12x faster"),
        ],
    )
    def test_ratios(self, ratio: float, size: str, speed: str) -> None:
        assert (size_text(ratio), speed_text(ratio)) == (size, speed)

    @pytest.mark.parametrize(
        ("test", "text"),
        [
            (paired(-0.003, -0.012, 0.006), "-0.3 points [-1.2, +0.6]"),
            (paired(-0.0301, -0.042, -0.0101, scale="difference"), "-0.0301 [-0.042, -0.010]"),
            (paired(1.043, 1.03, 1.06, scale="ratio"), "x1.043 [1.03, 1.06]"),
            (paired(1.0112, 1.0101, 1.0122, scale="ratio"), "x1.011 [1.010, 1.012]"),
            (paired(667_332.0, 621_000.0, 715_000.0, scale="ratio"), "x667 k [621 k, 715 k]"),
        ],
    )
    def test_changes(self, test: PairedTest, text: str) -> None:
        assert effect_text(test) == text

    def test_headline_says_slower_and_what_is_chance(self) -> None:
        found = comparison()
        assert headline(found, found["bnb-nf4"]).startswith("1.8x smaller, 2.5x slower, accuracy -")
        assert headline(found, found["int8"]).endswith(" within chance")
        assert headline(found, found["magnitude 50 %"]).endswith(" more than chance")
        assert len(evidence(found)) == 4
        assert re.search(r"answers lost, \d+ won of 1200; exact McNemar, p = ", evidence(found)[0])

    def test_chance_is_judged_after_holm(self) -> None:
        score = answers((0, 0), metric="m")
        found = of_scores(score, score, paired(-0.1, -0.2, -0.001, p=0.04))  # 0.08 after Holm
        assert headline(found, found["other"]) == "same size, m -10.0 points [-20.0, -0.1] within chance"

    def test_notes_say_why_there_is_no_speed_up(self) -> None:
        told = "\n".join(notes(comparison()))
        assert "bnb-nf4 is slower than teacher on this CPU: 0.41x at 1x128 tokens" in told
        assert "bitsandbytes is made for GPUs" in told
        assert "magnitude 50 % is no faster than teacher on this CPU; unstructured zeros (50% of its weights)" in told
        assert "magnitude 50 % has 50% zeros, which its dense file stores" in told
        assert "int8 is" not in told


class TestReasons:
    def reasons(self, *, flags: tuple[str, ...] = (), **of_entry: object) -> list[str]:
        base = entry("base", 0.9, 90.9, 40.0, 22.7, None)
        other = entry("other", 0.9, 45.0, 60.0, of_entry.pop("nonzero", 22.7), base, **of_entry)
        machine = MACHINE.model_copy(update={"cpu_flags": flags})
        return why_no_faster(Comparison(created="", entries=(base, other), machine=machine), other)

    def test_bf16_needs_instructions_for_it(self) -> None:
        assert "no bfloat16 instructions" in self.reasons(dtype="bfloat16", flags=("avx2",))[0]
        assert "matrix tiles" in self.reasons(dtype="bfloat16", flags=("avx512_bf16",))[0]
        assert self.reasons(dtype="bfloat16", flags=("amx_bf16", "avx512_bf16")) == []

    def test_a_pattern_is_named(self) -> None:
        step = {"name": "magnitude_pruning", "pattern": "2:4"}
        assert self.reasons(steps=(step,), nonzero=13.0)[0].startswith("2:4 zeros (43% of its weights)")

    def test_nothing_is_guessed(self) -> None:
        assert self.reasons() == []


class TestClasses:
    def test_recall_and_confusion_of_a_hand_case(self) -> None:
        base = answers((0, 0), (0, 0), (0, 1), (1, 1), classes=("cat", "dog", "never"))
        other = answers((0, 0), (0, 1), (0, 1), (1, 1), classes=("cat", "dog", "never"))
        found = of_scores(base, other)
        sheet = recalls(found, 0)
        assert [[cell.plain for cell in row] for row in sheet.rows] == [
            ["cat", "3", "66.7 %", "33.3 % (-33.3)"],
            ["dog", "1", "100.0 %", "100.0 %"],
        ]
        assert all(cell.good is None for row in sheet.rows for cell in row)  # one flip is chance
        ours, theirs = confusions(found, 0)
        assert [[field.count for field in row] for row in ours.rows] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
        assert [[field.count for field in row] for row in theirs.rows] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
        assert [field.shade for field in ours.rows[0]] == [6, 3, 0]

    def test_many_flips_one_way_are_coloured(self) -> None:
        base = answers(*[(0, 0)] * 20, classes=("cat", "dog"))
        other = answers(*[(0, 1)] * 10, *[(0, 0)] * 10, classes=("cat", "dog"))
        assert recalls(of_scores(base, other), 0).rows[0][-1].good is False

    def test_sets_of_classes_have_recalls_but_no_matrix(self) -> None:
        score = answers(((0, 1), (1,)), ((0,), (0, 1)), metric="subset_accuracy", classes=("a", "b"))
        found = of_scores(score, score)
        assert [row[2].text for row in recalls(found, 0).rows] == ["50.0 %", "100.0 %"]
        assert confusions(found, 0) == []

    def test_words_with_named_labels_are_counted_one_by_one(self) -> None:
        score = answers((("O", "B", "O"), ("O", "O", "B")), classes=("B", "O"))
        found = of_scores(score, score)
        assert [row[1].text for row in recalls(found, 0).rows] == ["1", "2"]
        assert [[field.count for field in row] for row in confusions(found, 0)[0].rows] == [[0, 1], [1, 1]]

    def test_many_classes_are_listed_by_their_commonest_confusions(self) -> None:
        classes = tuple(f"class {number}" for number in range(40))
        base = answers((3, 7), (3, 7), (5, 6), (1, 1), classes=classes)
        found = of_scores(base, base)
        assert confusions(found, 0) == []
        assert [cell.text for cell in commonest_confusions(found, 0).rows[0]] == ["class 3", "class 7", "2", "2"]


class TestExamples:
    def test_losses_come_first_then_wins_then_the_rest(self) -> None:
        base = answers((0, 0), (1, 0), (2, 0), (0, 0), classes=CLASSES)
        other = answers((0, 1), (1, 1), (2, 1), (0, 0), classes=CLASSES)
        found = of_scores(base, other, texts=("a", "b", "c", "d"))
        group = differences(found, found["other"], 0)
        assert (group.total, group.examples) == (3, 4)
        assert [(one.kind, one.text, one.label) for one in group.shown] == [
            ("lost", "a", "argparse"),
            ("won", "b", "asyncio"),
            ("other", "c", "collections"),
        ]
        assert group.shown[0].candidate[0].text == "asyncio"

    def test_at_most_twenty_and_not_only_losses(self) -> None:
        base = answers(*[(0, 0)] * 50, *[(1, 0)] * 50)
        other = answers(*[(0, 1)] * 50, *[(1, 1)] * 50)
        found = of_scores(base, other)
        kinds = [one.kind for one in differences(found, found["other"], 0).shown]
        assert len(kinds) == MOST_SHOWN
        assert kinds.count("lost") == 12

    def test_equal_answers_and_windows_show_nothing(self) -> None:
        same = answers((0, 0), (1, 0))
        windows = answers((None, None), values=(2.0,))
        for score in (same, windows):
            found = of_scores(score, score)
            assert differences(found, found["other"], 0) is None

    def test_tags_are_told_of_the_words_that_differ(self) -> None:
        base = answers((("B", "I", "O"), ("B", "I", "O")), classes=("B", "I", "O"))
        other = answers((("B", "I", "O"), ("B", "O", "O")), classes=("B", "I", "O"))
        found = of_scores(base, other, texts=("Ada Lovelace wrote",))
        shown = differences(found, found["other"], 0).shown[0]
        assert (shown.base[0].text, shown.candidate[0].text) == ("Lovelace: I", "Lovelace: O")
        cut = of_scores(base, other, texts=("Ada Love…",))
        assert differences(cut, cut["other"], 0).shown[0].base[0].text == "word 2: I"

    def test_choices_go_by_their_letters(self) -> None:
        found = of_scores(answers((2, 2), task="multiple_choice"), answers((2, 0), task="multiple_choice"))
        shown = differences(found, found["other"], 0).shown[0]
        assert (shown.label, shown.base[0].text, shown.candidate[0].text) == ("C", "C", "A")

    def test_numbers_that_moved_furthest_come_first(self) -> None:
        base = answers((1.0, 1.0), (1.0, 1.0), values=(0.0, 0.0))
        other = answers((1.0, 1.1), (1.0, 3.0), values=(0.0, 0.0))
        found = of_scores(base, other)
        assert [one.number for one in differences(found, found["other"], 0).shown] == [1, 0]

    @pytest.mark.parametrize("seed", range(20))
    def test_marked_pieces_are_the_whole_texts(self, seed: int) -> None:
        chance = random.Random(seed)
        first, second = ("".join(chance.choice("ab  \n") for _ in range(chance.randrange(30))) for _ in range(2))
        ours, theirs = marked(first, second)
        assert ("".join(p.text for p in ours), "".join(p.text for p in theirs)) == (first, second)
        plain = ["".join(p.text for p in pieces if not p.marked) for pieces in (ours, theirs)]
        assert plain[0] == plain[1]


class TestStages:
    def test_each_step_takes_from_the_one_before(self) -> None:
        fall = waterfalls(comparison())[0]
        assert [stage.name for stage in fall.stages] == ["base", "structured pruning", "dynamic quantization"]
        assert [stage.size for stage in fall.stages] == ["90.9 MB", "27.3 MB", "8.20 MB"]
        assert [stage.width for stage in fall.stages] == [100.0, pytest.approx(30.03, abs=0.02), 9.02]
        assert [stage.before for stage in fall.stages[1:]] == [stage.width for stage in fall.stages[:-1]]
        assert fall.stages[1].smaller == "3.3x smaller"
        assert fall.stages[1].score
        assert fall.stages[1].seconds == "1.5 s"

    def test_settings_are_told_where_they_are_no_default(self) -> None:
        stages = waterfalls(comparison())[0].stages
        assert stages[1].settings == "ffn 0.3"
        assert stages[2].settings == ""

    def test_without_a_run_there_is_none(self) -> None:
        assert [fall.name for fall in waterfalls(comparison()) if fall.name == "int8"] == []


class TestPlots:
    def test_pareto_front_of_hand_cases(self) -> None:
        points = [Point("a", 4, 0.9), Point("b", 1, 0.8), Point("c", 2, 0.8), Point("d", 2, 0.85), Point("e", 5, 0.9)]
        assert [point.name for point in pareto_front(points, higher_is_better=True)] == ["b", "d", "a"]
        assert [point.name for point in pareto_front(points, higher_is_better=False)] == ["b"]

    def test_names_are_escaped(self) -> None:
        svg = self.draw([Point('<b>"x"&', 2.0, 0.5), Point("z", 1.0, 0.4)])
        assert ">&lt;b&gt;&quot;x&quot;&amp;</text>" in svg
        assert "<b>" not in svg

    def test_better_is_up_whichever_way_the_metric_goes(self) -> None:
        points = [Point("good", 1.0, 2.0), Point("bad", 1.0, 9.0)]
        heights = [float(y) for y in re.findall(r'cy="([^"]+)"', self.draw(points, higher_is_better=False))]
        assert heights[0] < heights[1]
        heights = [float(y) for y in re.findall(r'cy="([^"]+)"', self.draw(points))]
        assert heights[0] > heights[1]

    def test_one_point_and_equal_points_are_drawn(self) -> None:
        for points in ([Point("a", 0.0, 0.0)], [Point("a", 1.0, 0.5), Point("b", 1.0, 0.5)]):
            assert self.draw(points).count("<circle") == len(points)

    def test_what_is_no_number_is_left_out(self) -> None:
        assert self.draw([Point("a", 1.0, float("nan")), Point("b", 1.0, 0.5)]).count("<circle") == 1

    @pytest.mark.parametrize(
        ("axis", "ticks"),
        [
            (Axis(0.0, 100.0, 0, 1, log=False), [0, 20, 40, 60, 80, 100]),
            (Axis(0.78, 0.9, 0, 1, log=False), [0.8, 0.825, 0.85, 0.875, 0.9]),
            (Axis(2.0, 5e6, 0, 1, log=True), [100, 1e4, 1e6]),
            (Axis(3.0, 60.0, 0, 1, log=True), [5, 10, 20, 50]),
        ],
    )
    def test_ticks_are_round(self, axis: Axis, ticks: list[float]) -> None:
        assert axis.ticks() == pytest.approx(ticks)

    def draw(self, points: list[Point], *, higher_is_better: bool = True) -> str:
        return scatter(
            points,
            cost="size",
            quality="accuracy",
            higher_is_better=higher_is_better,
            cost_text=str,
            quality_text=str,
        )


class TestLabels:
    FRAME = Box(58, 0, 400, 250)

    def test_the_name_that_was_run_through_by_a_bar_stands_clear(self) -> None:
        names = ["half FFN, 2 of 6 layers, int8", "int8", "teacher"]
        points = [(110.0, 60.0), (145.0, 40.0), (340.0, 45.0)]
        bars = [Box(x - 1.2, y - 35, x + 1.2, y + 35) for x, y in points]
        self.check(names, points, bars)

    @pytest.mark.parametrize("seed", range(30))
    def test_seven_models_anywhere_have_names_apart(self, seed: int) -> None:
        chance = random.Random(seed)
        names = [chance.choice(["int8", "half FFN, 2 of 6 layers, int8", "magnitude 50 %"]) for _ in range(7)]
        points = [(chance.uniform(70, 380), chance.uniform(20, 240)) for _ in range(7)]
        bars = [Box(x - 1.2, y - 12, x + 1.2, y + 12) for x, y in points]
        self.check(names, points, bars)

    def check(self, names: list[str], points: list[tuple[float, float]], bars: list[Box]) -> None:
        labels = place(names, points, lines=bars, frame=self.FRAME, radius=6)
        for number, label in enumerate(labels):
            assert label.box.overlap(self.FRAME) == pytest.approx(label.box.area)
            assert not any(label.box.overlap(bar) for bar in bars)
            assert not any(label.box.overlap(other.box) for other in labels[number + 1 :])


def test_a_table_drawn_in_a_notebook_is_text_and_nothing_that_rich_displays(monkeypatch):
    table = Table(("model", "size"), (("a", "1 MB"),), title="sizes", notes=("one note",))
    elsewhere = table.text()
    shown: list[object] = []
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("rich.jupyter.display", lambda *arguments: shown.append(arguments))
    assert table.text() == elsewhere
    assert not shown
