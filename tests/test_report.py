"""The renderings of one comparison: nothing is lost, nothing is markup, nothing is fetched."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import jsonschema
import pytest
from rich.console import Console

from comparisons import NASTY, comparison, of_scores
from llmcompress.comparison import Comparison
from llmcompress.errors import ConfigError
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.report import schema

PUBLISHED = Path(__file__).resolve().parent.parent / "docs" / "comparison.schema.json"


class Page(HTMLParser):
    """Collects what a browser would run or fetch, and the text it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.shown: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"src", "href", "xlink:href", "action"}]
        self.handlers += [name for name, _ in attrs if name.startswith("on") or name == "style"]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


@pytest.fixture(scope="module")
def page() -> str:
    return comparison().to_html()


class TestPage:
    def test_runs_its_own_script_and_fetches_nothing(self, page: str) -> None:
        parsed = Page()
        parsed.feed(page)
        assert parsed.tags.count("script") == 1
        assert parsed.links == parsed.handlers == []
        assert "url(" not in page
        assert "@import" not in page

    def test_policy_allows_this_script_and_style_and_nothing_else(self, page: str) -> None:
        policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page).group(1)
        for tag in ("script", "style"):
            content = re.search(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL).group(1)
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy
        assert policy.startswith("default-src 'none';")
        assert "unsafe" not in policy

    def test_a_nasty_name_text_and_label_is_shown_as_it_is(self, page: str) -> None:
        parsed = Page()
        parsed.feed(page)
        text = "".join(parsed.shown)
        assert re.search(rf"text \d+ {re.escape(NASTY)}", text)  # an example that was answered otherwise
        assert text.count(NASTY) >= 25  # card, tables, plots, classes, examples
        assert page.count("<script") == 1

    def test_has_every_model_in_both_plots(self, page: str) -> None:
        drawings = re.findall(r"<svg[^>]*role=.*?</svg>", page, flags=re.DOTALL)
        assert len(drawings) == 2
        for drawing in drawings:
            for name in ("teacher", "int8", "bnb-nf4", "magnitude 50 %"):
                assert f">{name}</text>" in drawing

    def test_collapse_is_an_alarm(self) -> None:
        found = comparison()
        entry = found["magnitude 50 %"]
        one = entry.change.fidelity[0].model_copy(update={"collapse": "collapse: one answer is given to 90%"})
        change = entry.change.model_copy(update={"fidelity": (one,)})
        collapsed = entry.model_copy(update={"change": change})
        alarmed = found.model_copy(update={"entries": (*found.entries[:-1], collapsed)})
        assert '<p class="alarm"><b>Collapsed:</b> one answer is given to 90%</p>' in alarmed.to_html()
        assert "magnitude 50 %: COLLAPSED: same size" in str(alarmed)
        assert "alarm" not in re.sub(r"<style>.*?</style>", "", found.to_html(), flags=re.DOTALL)

    def test_one_model_alone_has_a_page(self) -> None:
        found = comparison()
        alone = found.model_copy(update={"entries": found.entries[:1]})
        assert "Side by side" in alone.to_html()
        assert "Answers that changed" not in alone.to_html()


class TestDocument:
    def test_json_is_the_whole_comparison(self, tmp_path) -> None:
        found = comparison()
        assert Comparison.from_json(found.to_json()) == found
        assert Comparison.from_json(found.save(tmp_path / "deep" / "report.json").read_text()) == found

    def test_saved_json_renders_to_the_same_page(self, page: str) -> None:
        assert Comparison.from_json(comparison().to_json()).to_html() == page

    def test_saved_json_fits_the_schema(self) -> None:
        found = json.loads(comparison().to_json())
        checker = jsonschema.Draft202012Validator(Comparison.json_schema())
        checker.validate(found)
        found["entries"][1]["change"]["smaller_on_disk"] = "much"
        assert [list(error.path)[:4] for error in checker.iter_errors(found)] == [["entries", 1, "change"]]

    def test_published_schema_is_this_one(self) -> None:
        assert json.loads(PUBLISHED.read_text()) == schema.json_schema(), (
            "docs/comparison.schema.json is out of date; write it anew with: make schema"
        )

    def test_numbers_that_json_has_not_come_back(self) -> None:
        score = TaskScore(
            task="toy",
            metrics={"pearson": math.nan, "perplexity": math.inf},
            kinds={"pearson": MetricKind(scale="difference"), "perplexity": MetricKind(scale="ratio")},
            primary="perplexity",
            protocol={},
        )
        found = of_scores(score, score)
        text = found.to_json()
        jsonschema.Draft202012Validator(Comparison.json_schema()).validate(json.loads(text))
        back = Comparison.from_json(text).base.evaluation.score.metrics
        assert math.isnan(back["pearson"])
        assert back["perplexity"] == math.inf
        assert "perplexity" in found.to_html()


class TestText:
    def test_markdown_escapes_names_and_keeps_its_columns(self, tmp_path) -> None:
        text = comparison().save(tmp_path / "report.md").read_text()
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) == 2 + 5
        assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(re.findall(r"(?<!\\)\|", rows[0]))}
        assert "<script>" not in text
        assert "- int8: 3.9x smaller, 2.5x faster, accuracy" in text

    def test_terminal_shows_brackets_and_tags_as_text(self) -> None:
        text = str(comparison("[bold]x[/bold]"))
        assert text.count("[bold]x[/bold]") >= 2
        assert "teacher" in text

    def test_rich_fits_the_console_and_reads_no_markup(self) -> None:
        out = io.StringIO()
        Console(file=out, width=100, force_terminal=True, color_system="standard").print(comparison("[bold]x[/bold]"))
        plain = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue())
        assert "[bold]x[/bold]" in plain
        assert max(map(len, plain.splitlines())) <= 100
        assert "\x1b[" in out.getvalue()

    def test_notebook_table_is_escaped(self) -> None:
        found = comparison()._repr_html_()
        assert "<script>" not in found
        assert "&lt;script&gt;" in found


class TestFrame:
    def test_csv_has_the_numbers_as_they_are(self, tmp_path) -> None:
        found = comparison()
        rows = list(csv.DictReader(io.StringIO(found.save(tmp_path / "report.csv").read_text())))
        assert [row["name"] for row in rows] == [entry.name for entry in found.entries]
        test = found["int8"].change.tests[0][0]
        assert float(rows[1]["accuracy"]) == found["int8"].evaluation.score.value
        assert float(rows[1]["accuracy_change_low"]) == test.low
        assert float(rows[1]["accuracy_p_holm"]) == test.p_holm
        assert float(rows[1]["speedup_8x128"]) == found["int8"].change.faster[1].ratio
        assert rows[0]["accuracy_change"] == rows[0]["right_to_wrong"] == ""

    def test_dataframe_is_the_csv(self) -> None:
        frame = comparison().to_dataframe()
        assert list(frame["is_base"]) == [True, False, False, False, False]
        assert frame["latency_ms_1x128"].tolist() == [48.0, 19.5, 9.1, 118.0, 48.2]
        header = comparison().to_csv().splitlines()[0]
        assert list(frame.columns) == next(csv.reader([header]))

    def test_two_tasks_of_one_name_are_numbered(self) -> None:
        found = comparison()
        entries = []
        for entry in found.entries:
            scores = (entry.evaluation.score, entry.evaluation.score.model_copy(update={"metrics": {"accuracy": 0.5}}))
            change = entry.change and entry.change.model_copy(
                update={name: getattr(entry.change, name) * 2 for name in ("tests", "flips", "fidelity")}
            )
            evaluation = entry.evaluation.model_copy(update={"scores": scores})
            entries.append(entry.model_copy(update={"evaluation": evaluation, "change": change}))
        twice = found.model_copy(update={"entries": tuple(entries), "inputs": found.inputs * 2})
        frame = twice.to_dataframe()
        assert frame["text_classification_2/accuracy"].tolist() == [0.5] * 5
        assert frame["text_classification_1/accuracy"][0] == found.base.evaluation.score.value
        assert twice.to_html().count("Quality: text classification") == 2


class TestSave:
    def test_other_endings_are_refused_and_leave_no_file(self, tmp_path) -> None:
        with pytest.raises(ConfigError, match=r"\.html, \.md, \.json, \.csv"):
            comparison().save(tmp_path / "report.pdf")
        assert list(tmp_path.iterdir()) == []

    def test_an_interrupted_write_leaves_the_earlier_report(self, tmp_path, monkeypatch) -> None:
        (tmp_path / "report.md").write_text("earlier")
        write = Path.write_text

        def half(self: Path, text: str, **options: str) -> int:
            write(self, text[: len(text) // 2], **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            comparison().save(tmp_path / "report.md")
        assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
        assert (tmp_path / "report.md").read_text() == "earlier"


def test_generated_texts_stand_side_by_side_with_the_differing_words_marked() -> None:
    def score(*texts: str) -> TaskScore:
        results = [ExampleResult(values={"rouge": 0.5}, label="the <b>cat</b> sat", prediction=text) for text in texts]
        kinds = {"rouge": MetricKind()}
        return TaskScore(
            task="toy", metrics={"rouge": 0.5}, kinds=kinds, primary="rouge", examples=tuple(results), protocol={}
        )

    found = of_scores(score("a <i>red</i> cat", "same"), score("a <script>x</script> cat", "same"), texts=("in", "put"))
    page = found.to_html()
    assert "a <mark>&lt;i&gt;red&lt;/i&gt; </mark>cat" in page
    assert "a <mark>&lt;script&gt;x&lt;/script&gt; </mark>cat" in page
    assert "the &lt;b&gt;cat&lt;/b&gt; sat" in page
    assert "1 of 2 answers differ" in page


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_a_click_sorts_by_numbers_and_the_policy_lets_the_script_run(tmp_path) -> None:
    page = comparison().to_html()
    script = re.search("<script>(.*?)</script>", page, flags=re.DOTALL).group(1)
    clicking = f'{script}\ndocument.querySelectorAll("th button")[2].click();'
    hashes = [base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in (script, clicking)]
    (tmp_path / "page.html").write_text(page.replace(script, clicking).replace(*hashes))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = ["chromium", *options, "--dump-dom", (tmp_path / "page.html").as_uri()]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    table = re.search(r'<table class="sortable">.*?</table>', found, flags=re.DOTALL).group(0)
    assert re.findall(r'aria-sort="(\w+)"', table) == ["ascending"]
    assert re.findall(r"([\d.]+ MB)", re.sub(r"<small.*?</small>", "", table)) == [
        "8.20 MB",
        "23.1 MB",
        "51.0 MB",
        "90.9 MB",
        "90.9 MB",
    ]
