"""`lc.fit`: targets, the solver against all choices, a search on a clock of its own, whole runs on tiny models."""

import itertools
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Cache

import llmcompress as lc
from llmcompress.anatomy.footprint import disk_bytes
from llmcompress.anatomy.stacks import Stack
from llmcompress.checkpoint import verify
from llmcompress.class_labels import ClassIndex
from llmcompress.compressor import Context
from llmcompress.data import load_examples
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.fitting import budget as budget_module
from llmcompress.fitting import search as search_module
from llmcompress.fitting import space as space_module
from llmcompress.fitting import survey as survey_module
from llmcompress.fitting.bench import Bench
from llmcompress.fitting.blocks import BlockTimer
from llmcompress.fitting.budget import Budget
from llmcompress.fitting.holdout import hold_out
from llmcompress.fitting.outcome import sentence_of
from llmcompress.fitting.predictor import Predictor, calibrated
from llmcompress.fitting.recovery import find_recovery
from llmcompress.fitting.search import Search
from llmcompress.fitting.solver import BlockWay, Problem, RestWay, Skeleton, solve
from llmcompress.fitting.space import FORMS, Shape, Space, Vocabulary
from llmcompress.fitting.survey import Survey
from llmcompress.fitting.targets import Targets, drop_text, read_targets
from llmcompress.fitting.trial import Cost, Trial
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

# Targets


def test_bad_targets_are_refused_before_any_work():
    model = tiny_model("bert")
    task = lc.TextClassification([("good", 1), ("bad", 0)])
    for wrong, said in (
        ({}, "must have a target"),
        ({"size": "12"}, r"fit\.size must be a quantity such as '12 MB'.*got '12'"),
        ({"size": 0}, r"fit\.size"),
        ({"size": 12e6}, r"or an integer of bytes, got 12000000\.0"),
        ({"size": "-3 MB"}, r"fit\.size"),
        ({"latency": 3}, r"fit\.latency must be a quantity such as '3 ms'"),
        ({"latency": "3 MB"}, "in one of us, ms"),
        ({"speedup": 1}, r"fit\.speedup must be a number above 1"),
        ({"speedup": float("nan")}, r"fit\.speedup"),
        ({"speedup": 2, "max_drop": -0.1}, r"fit\.max_drop"),
        ({"speedup": 2, "max_drop": float("nan")}, r"fit\.max_drop must be a number in .*, got nan\."),
        ({"speedup": 2, "seed": "x"}, r"fit\.seed must be an integer in \[0, 2\*\*32\), got 'x'"),
        ({"size": "1 GB"}, r"at most 1\.00 GB on disk: it is 454 kB already, there is nothing to do"),
        ({"size": "1 GB", "latency": "1 h"}, r"it is 454 kB and .* a pass already"),
        ({"speedup": 2, "budget": 600}, r"fit\.budget must be a quantity such as '10 min'"),
        ({"speedup": 2, "shape": (1, 0)}, r"fit\.shape must be \(rows, tokens\)"),
        ({"speedup": 2, "shape": (1, 4096)}, "at most 512 tokens"),
    ):
        with pytest.raises(lc.ConfigError, match=said):
            lc.fit(model, task, ["text"], tokenizer=tiny_tokenizer(), progress=False, **wrong)
    with pytest.raises(lc.ConfigError, match=r"fit\.task must be a Task"):
        lc.fit(model, "accuracy", ["text"], size="1 MB")
    with pytest.raises(lc.MissingInputError, match="fit needs data"):
        lc.fit(model, task, None, size="1 MB")
    with pytest.raises(lc.ConfigError, match=r"fit\.model must be a transformers model.*got None"):
        lc.fit(None, task, ["text"], size="1 MB")
    # A folder is not even looked for before the numbers are read.
    with pytest.raises(lc.ConfigError, match="must have a target"):
        lc.fit("no such folder", task, ["text"])
    with pytest.raises(lc.UnsupportedModelError):
        lc.fit(tiny_model("llama"), task, ["text"], size="1 MB", tokenizer=tiny_tokenizer())


def test_rows_that_cannot_be_trained_on_are_named_before_any_work(monkeypatch):
    monkeypatch.setattr("llmcompress.fitting.fit._fit", lambda *args: pytest.fail("work has begun"))
    bert, t5, given = tiny_model("bert"), tiny_model("t5"), {"size": "90 kB", "tokenizer": tiny_tokenizer()}
    bert.config.label2id = {"ham": 0, "spam": 1}
    rows = [("some text", index % 2) for index in range(39)]
    task = lc.TextClassification(rows)
    for last, said in (
        (("text", 7), r"data\[39\]\.label must be a class of BertForSequenceClassification.*got 7"),
        (("", 1), r"token in each row, and that of data\[39\] has none"),
        (("text", ClassIndex(0, "spam")), "'eggs' beside 'spam'"),
    ):
        known = [("text", ClassIndex(1, "eggs")), *rows[1:]] if "beside" in said else rows
        with pytest.raises((lc.ConfigError, lc.MissingInputError), match=said):
            lc.fit(bert, task, [*known, last], **given)
    pairs = [lc.Example("a text", "another")] * 2
    with pytest.raises(lc.MissingInputError, match=r"fit needs target texts .*, and data\[2\] has none.*'text_pair'\."):
        lc.fit(t5, lc.TextGeneration([("a", "b")]), [*pairs, "a text"], **given)


def test_short_texts_are_taken_more_of_instead_of_refused():
    model = tiny_model("bert")
    batches = survey_module._batches(model, Context(data=[lc.Example("ab")] * 40, tokenizer=tiny_tokenizer()), 4)
    assert sum(batch["input_ids"].numel() for batch in batches) == 32
    with pytest.raises(lc.MissingInputError, match="9 texts have 18 tokens in all"):
        survey_module._batches(model, Context(data=[lc.Example("ab")] * 9, tokenizer=tiny_tokenizer()), 4)


def test_labels_that_only_some_rows_have_are_told(tmp_path):
    model, notes = tiny_model("bert"), []
    rows = [lc.Example("text", label=1), lc.Example("text"), lc.Example("text", label=0)]
    task = lc.TextClassification([("text", 0)])
    recovery, _ = find_recovery(model, task, rows, tiny_tokenizer(), str(tmp_path), notes)
    assert recovery.alpha == 1.0
    assert notes == ["labels are not trained on: 1 of 3 examples have none"]
    find_recovery(model, task, rows[1:2], tiny_tokenizer(), str(tmp_path), notes)
    assert len(notes) == 1


def test_an_original_without_a_score_is_refused():
    model = tiny_model("bert")
    model.config.num_labels, model.config.problem_type = 1, "regression"
    model.classifier = torch.nn.Linear(model.config.hidden_size, 1)
    rows = [(f"text {index}", 2.0) for index in range(12)]
    with pytest.raises(lc.ConfigError, match=r"fit\.task must give the original a finite pearson, got nan on the 4"):
        lc.fit(model, lc.TextClassification(rows), rows, size="90 kB", tokenizer=tiny_tokenizer(), progress=False)


def perplexity_of(value):
    kinds = {"perplexity": MetricKind(scale="ratio", lower_is_better=True)}
    values = {"perplexity": value}
    return TaskScore(task="toy", metrics=values, kinds=kinds, primary="perplexity", protocol={})


def test_a_chain_whose_loss_is_no_number_has_failed():
    class Broken:
        def evaluate(self, *args, **settings):
            return perplexity_of(float("inf"))

    class Untouched:
        name, recovers = "as it is", False

        def steps(self, recovery=None):
            return []

    targets = Targets(1000, None, None, 0.05, (1, 128), 600.0)
    context = Context(tokenizer=tiny_tokenizer())
    clock = Budget(600.0, progress=False)
    bench = Bench(tiny_model("bert"), context, None, targets, Broken(), perplexity_of(2.0), 1.0, 0, clock)
    trial = bench.run(Untouched(), 0, "short")
    assert (trial.drop, trial.error) == (None, "its perplexity is inf")


def test_small_and_infinite_numbers_are_told_as_they_are():
    targets = Targets(1000, 0.001, None, 0.0004, (1, 128), 600.0)
    assert targets.text() == "at most 1.00 kB on disk and at most 0.001 ms at 1x128 tokens"
    share = TaskScore(
        task="toy", metrics={"accuracy": 0.5}, kinds={"accuracy": MetricKind()}, primary="accuracy", protocol={}
    )
    found = [drop_text(drop, share) for drop in (0.0004, 0.0, 0.0123, -0.0002)]
    assert found == ["0.04 points", "0.0 points", "1.2 points", "-0.02 points"]
    chain = SimpleNamespace(name="int8")
    final = Trial(chain, "final", 0, Cost(900, 0.001, 2.0), float("inf"), 0.0, 1.0)
    ended = SimpleNamespace(feasible=True)
    told = sentence_of(targets, ended, Cost(2000, 1.0, 1.0), final, perplexity_of(2.0), met=False)
    assert "cannot be shown to lose no more than 0.0004" in told
    assert told.endswith("the loss of perplexity cannot be told (inf).")


def test_units_and_what_holds():
    given = {"latency": "1500 us", "speedup": 4, "max_drop": 0.01, "shape": (2, 16), "budget": "1.5 h"}
    found = read_targets(size="2 MiB", **given)
    assert (found.size, found.latency, found.budget) == (2 * 2**20, 1.5, 5400.0)
    assert found.milliseconds(4.0) == 1.0
    assert found.hold(2 * 2**20, 1.5, 4.0)
    for wrong in ((2 * 2**20 + 1, 1.5, 4.0), (1, 1.51, 4.0), (1, 1.5, 3.99), (1, None, 4.0)):
        assert not found.hold(*wrong)


# The solver


def random_problem(generator, blocks=3):
    def number(scale=1.0):
        return float(generator.exponential(scale))

    forms = [(0, 32), (1, 8), (1, 4)]
    ways = [
        [BlockWay(s, scheme, bits, number(), number(10) + 1, number()) for s in range(2) for scheme, bits in forms]
        for _ in range(blocks)
    ]
    rests = [RestWay(v, scheme, bits, number(), number(10), number()) for v in range(2) for scheme, bits in forms]
    stacks = [range(blocks - 1), [blocks - 1]]
    return Problem(
        ways, [number(2) for _ in range(blocks)], [0.0, *(number() for _ in range(blocks - 2))], stacks, rests
    )


def every_choice(problem):
    """Yield damage, bytes, milliseconds, skeleton and vocabulary of all that can be chosen, one by one."""
    blocks = range(len(problem.blocks))
    for count in range(1, len(problem.blocks) + 1):
        for kept in itertools.combinations(blocks, count):
            if not all(set(stack) & set(kept) for stack in problem.stacks):
                continue
            for rest in problem.rests:
                for shape in range(2):
                    own = [
                        [way for way in problem.blocks[b] if way.shape == shape and way.scheme == rest.scheme]
                        for b in kept
                    ]
                    for ways in itertools.product(*own):
                        parts = [*ways, rest]
                        gone = [b for b in blocks if b not in kept]
                        damage = sum(p.damage for p in parts) + sum(problem.drops[b] for b in gone)
                        damage += problem.together[len(gone)]
                        skeleton = Skeleton(count, shape, rest.scheme)
                        cost = (sum(p.bytes for p in parts), sum(p.ms for p in parts))
                        yield damage, *cost, skeleton, rest.vocabulary


def test_the_solver_finds_the_best_of_all_choices():
    generator = np.random.default_rng(0)
    for _ in range(4):
        problem = random_problem(generator)
        choices = list(every_choice(problem))
        sizes, times = (np.array([choice[at] for choice in choices]) for at in (1, 2))
        for share in (0.1, 0.5):
            limits = {"bytes": float(np.quantile(sizes, share)), "ms": float(np.quantile(times, share))}
            within = [c for c in choices if c[1] <= limits["bytes"] and c[2] <= limits["ms"]]
            found = solve(problem, limits)
            if not within:
                assert found is None
                continue
            best = min(within)
            assert found.damage == pytest.approx(best[0], rel=1e-3)
            assert found.bytes <= limits["bytes"] * (1 + 1e-6)
            # The next best of another skeleton, and the best with a vocabulary that is given.
            others = [c for c in within if c[3] != found.skeleton]
            second = solve(problem, limits, excluded=[found.skeleton])
            assert (second is None) == (not others)
            if others:
                assert second.damage == pytest.approx(min(others)[0], rel=1e-3)
            fixed = [c for c in within if c[4] == 1]
            third = solve(problem, limits, vocabulary=1)
            assert third.damage == pytest.approx(min(fixed)[0], rel=1e-3) if fixed else third is None
        smallest = solve(problem, {}, minimise="bytes")
        assert smallest.bytes == pytest.approx(sizes.min(), rel=1e-3)


def test_weights_learn_from_outcomes_and_keep_to_the_prior_without_them():
    prior = {"depth": 0.1, "width": 0.1}
    assert calibrated([], prior) == prior
    outcomes = [({"depth": 1.0, "width": 0.0}, 0.04), ({"depth": 0.0, "width": 1.0}, 0.01)]
    found = calibrated(outcomes * 5, prior)
    assert found["depth"] > 2 * found["width"] > 0
    assert calibrated([({"depth": 1.0}, -0.2)], prior) == prior


# What decides and what verifies


def test_no_example_decides_and_verifies():
    texts = [(f"text {number}", number % 2) for number in range(30)]
    choose, verify, remark = hold_out(lc.TextClassification(texts, max_length=9), seed=1)
    seen, kept = ({one.text for one in part.examples} for part in (choose, verify))
    assert remark is None
    assert (len(seen), len(kept), seen & kept) == (10, 20, set())
    assert choose.max_length == verify.max_length == 9
    running = lc.LanguageModeling(["one two three four five six seven eight nine ten " * 30], window=16)
    choose, verify, _ = hold_out(running, seed=0)
    words = [sum(len(one.text.split()) for one in part.examples) for part in (choose, verify)]
    assert sum(words) == 300
    assert words[0] == pytest.approx(100, abs=10)
    task = lc.TextClassification([("good", 1), ("bad", 0)])
    assert hold_out(task, seed=0)[0] is task
    assert "chosen" in hold_out(task, seed=0)[2]


class Benchmarks(lc.LMEvalTask):
    """Two of lm-eval's tasks of a thousand questions in all, without lm-eval."""

    def __post_init__(self):
        pass

    def evaluate(self, *args, **settings):
        time.sleep(0.3)
        results = (ExampleResult(values={"acc": 1.0}),) * 1000
        kinds = {"acc": MetricKind()}
        return TaskScore(
            task="lm_eval", metrics={"acc": 1.0}, kinds=kinds, primary="acc", examples=results, protocol={}
        )


def test_the_questions_of_lm_eval_are_counted_and_not_its_names(monkeypatch):
    kept = []

    def spied(model, context):
        kept.extend(context.data)
        raise lc.UnsupportedModelError("enough")

    monkeypatch.setattr("llmcompress.fitting.fit.find_space", spied)
    task, model = Benchmarks(["one", "two"]), tiny_model("llama")
    with pytest.raises(lc.UnsupportedModelError, match="enough"):
        lc.fit(model, task, ["text"] * 40, size="1 kB", budget="10 s", tokenizer=tiny_tokenizer(), progress=False)
    assert len(kept) == 40
    for names in (["one"], list("abcdef")):
        choose, verify, remark = hold_out(Benchmarks(names), seed=0)
        assert choose is verify
        assert "lm-eval reads its examples by itself" in remark


def test_the_bar_tells_stage_and_time_left(capsys):
    clock = Budget(600.0, progress=True)
    with clock.stage("solving"):
        pass
    clock.close()
    assert "| fit: solving, " in capsys.readouterr().err


@pytest.fixture
def surveyed(monkeypatch):
    monkeypatch.setattr(space_module, "_SEEN", (None,))

    def of(model, shapes=((None, 0.5),)):
        monkeypatch.setattr(space_module, "_SHAPES", shapes)
        data = [example.text for example in tiny_data(model, rows=8)]
        context = Context(data=load_examples(data), tokenizer=tiny_tokenizer(), teacher=model, device=model.device)
        space = space_module.find_space(model, context)
        budget = Budget(1.0, progress=False)
        return Predictor(space, survey_module.survey(model, space, context, [], (1, 8), budget)), space

    return of


def test_what_turns_out_to_be_impossible_is_left_out_and_told(surveyed):
    # Its plan says that heads can go, and it does not run with fewer of them.
    predictor, space = surveyed(tiny_model("phi3"))
    assert len(space.shapes) == 2
    assert {way.shape for ways in predictor.problem().blocks for way in ways} == {0}
    assert any("is left out: Phi3ForCausalLM does not run" in note for note in space.notes)
    # It has a table a head wide, too narrow for groups.
    predictor, space = surveyed(tiny_model("t5"))
    assert [form.scheme for form in space.forms] == ["float", "int8"]
    assert any("no packed weights of 4 bits: WeightOnlyQuantization.group_size" in note for note in space.notes)
    # Its first block hands the others a bias of one row a head.
    assert {way.shape for ways in predictor.problem().blocks for way in ways} == {0}
    assert any("is left out: The size of tensor" in note for note in space.notes)


def test_embeddings_that_stay_are_none_to_stop_at(surveyed):
    predictor, _ = surveyed(tiny_model("gemma"), shapes=())
    own = {FORMS[rest.scheme].scheme: rest.bytes for rest in predictor.problem().rests}
    assert own["int8"] == own["float"]


def test_a_block_is_timed_without_the_cache_that_it_gets_by_place():
    model = tiny_model("gpt2")
    timer = BlockTimer(model, ["transformer.h.0"], (1, 8), seconds=0.0)
    args, kwargs = timer._calls["transformer.h.0"]
    assert not any(isinstance(value, Cache) for value in (*args, *kwargs.values()))
    assert timer.block(model, "transformer.h.0") > 0


# The search, with a lab and a clock of its own


class Clock:
    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


class FakeLab:
    """Costs as the survey says but for times, which are a fifth longer; a loss that training halves every 200 steps."""

    def __init__(self, clock, predictor, floor=0.0):
        self.clock, self.predictor, self.floor, self.asked, self.times = clock, predictor, floor, [], {}

    def cost(self, chain):
        self.clock.seconds += 1.0
        solution = chain.solution
        blocks = sum(way.ms for way in solution.kept.values())
        surveyed = blocks / self.predictor.slowness(solution.skeleton.scheme, solution.skeleton.shape)
        ms = self.times.setdefault(chain.name, 1.2 * (surveyed + solution.rest.ms))
        return Cost(int(solution.bytes), ms, 10.0 / ms)

    def steps_in(self, chain, seconds):
        return max(int(seconds / 0.1), 1)

    def run(self, chain, steps, stage):
        self.asked.append((chain.name, steps, stage))
        self.clock.seconds += steps * 0.1 * 1.1  # a tenth slower than was thought
        start = sum(self.predictor.damages(chain.solution).values())
        drop = self.floor + 0.1 * start * 0.5 ** (steps / 200)
        return Trial(chain, stage, steps, self.cost(chain), drop, 0.005, steps * 0.11)


def slowed(cost, seconds=40, ms=None):
    """Let it take so long to measure a chain, and if that is given the chain so slow."""

    def measured(self, chain):
        self.clock.seconds += seconds if chain.name not in self.times else 0
        found = cost(self, chain)
        return found if ms is None else Cost(found.bytes, ms, 10.0 / ms)

    return measured


@pytest.fixture
def predictor():
    stack = Stack("layers", torch.nn.ModuleList(torch.nn.Identity() for _ in range(6)))
    shapes, forms = [Shape(), Shape(ffn=0.5)], FORMS[:2]
    space = Space([stack], shapes, [Vocabulary()], forms, [])
    width = {forms[0]: (8e6, 1.5), forms[1]: (2e6, 0.75)}
    pairs = {(shape, form): width[form] for shape in shapes for form in forms}
    factor = {shapes[0]: 1.0, shapes[1]: 0.6}
    survey = Survey(
        drops=[0.9, 0.1, 0.1, 0.2, 0.2, 0.5],
        together=[0.0, 0.0, 0.1, 0.3, 0.6, 1.5],
        widths={shapes[0]: [0.0] * 6, shapes[1]: [0.1] * 6},
        rounding={forms[0]: [0.0] * 6, forms[1]: [0.001] * 6},
        rest_rounding={forms[0]: 0.0, forms[1]: 0.001},
        vocabulary={Vocabulary(): 0.0},
        block_bytes={pair: [factor[pair[0]] * size] * 6 for pair, (size, _) in pairs.items()},
        block_ms={pair: [factor[pair[0]] * ms] * 6 for pair, (_, ms) in pairs.items()},
        rest_bytes={(Vocabulary(), forms[0]): 10e6, (Vocabulary(), forms[1]): 2.5e6},
        rest_ms={forms[0]: 1.0, forms[1]: 0.5},
    )
    return Predictor(space, survey)


def searched(predictor, monkeypatch, targets, floor=0.0):
    clock = Clock()
    monkeypatch.setattr(budget_module, "now", clock)
    budget = Budget(targets.budget, progress=False)
    lab = FakeLab(clock, predictor, floor)
    found = Search(predictor, lab, targets, Cost(58_000_000, 10.0, 1.0), budget).run()
    # The final training takes what is left.
    lab.run(found.chain, lab.steps_in(found.chain, budget.left()), "final")
    return found, lab, clock


def test_a_chain_that_was_measured_is_predicted_exactly_whatever_others_took(predictor):
    limits = {"ms": 4.0}
    first = solve(predictor.problem(), limits, vocabulary=0)
    scheme, shape = first.skeleton.scheme, first.skeleton.shape

    def now(shape):
        blocks = predictor.problem().blocks
        ways = {
            number: next(way for way in blocks[number] if (way.shape, way.scheme) == (shape, scheme))
            for number in first.kept
        }
        return replace(first, kept=ways)

    def predicted(shape):
        return sum(way.ms for way in now(shape).kept.values()) + first.rest.ms

    assert predicted(shape) == pytest.approx(first.ms)
    # Twice, with numbers from before it was corrected.
    for _ in range(2):
        predictor.time_of(first, 2 * first.ms)
    assert predicted(shape) == pytest.approx(2 * first.ms)
    assert predictor.slowness(scheme, 1 - shape) == pytest.approx(predictor.slowness(scheme, shape))
    again = solve(predictor.problem(), limits, vocabulary=0)
    assert again.skeleton != first.skeleton
    assert again.ms <= 4.0
    predictor.time_of(now(1 - shape), 3.0)
    assert (predicted(shape), predicted(1 - shape)) == (pytest.approx(2 * first.ms), pytest.approx(3.0))
    predictor.time_of(first, first.rest.ms / 2)
    assert predicted(shape) > first.rest.ms


def test_the_search_halves_and_keeps_to_its_budget(predictor, monkeypatch):
    targets = Targets(9_000_000, None, None, 0.05, (1, 128), 600.0)
    found, lab, clock = searched(predictor, monkeypatch, targets)
    stages = [stage for _, _, stage in lab.asked]
    assert stages[:4] == ["short"] * 4
    assert stages[-3:] == ["longer", "longer", "final"]
    assert len({name for name, _, stage in lab.asked if stage == "short"}) == stages.count("short")
    short, longer, final = (
        max(s for _, s, stage in lab.asked if stage == which) for which in ("short", "longer", "final")
    )
    assert longer == pytest.approx(2 * short, rel=0.01)
    assert final > longer
    assert 0.8 * 600 < clock.seconds < 1.2 * 600
    assert found.feasible
    assert found.within
    assert found.chain.solution.bytes <= 9_000_000
    best = min((trial for trial in found.trials if trial.stage == "longer"), key=lambda trial: trial.drop)
    assert found.chain == best.chain


def test_proposing_ends_in_time(predictor, monkeypatch):
    targets = Targets(9_000_000, None, None, 0.05, (1, 128), 600.0)
    monkeypatch.setattr(FakeLab, "cost", slowed(FakeLab.cost))
    found, lab, clock = searched(predictor, monkeypatch, targets)
    assert [stage for _, _, stage in lab.asked].count("short") == 3
    assert clock.seconds < 1.2 * 600
    assert found.feasible


def test_a_search_without_time_does_not_say_that_nothing_is_small_enough(predictor, monkeypatch):
    # Each chain turns out slower than it must be, and there is time to measure few of them.
    monkeypatch.setattr(FakeLab, "cost", slowed(FakeLab.cost, seconds=400, ms=9.0))
    found, _, _ = searched(predictor, monkeypatch, Targets(None, None, 4.0, 0.05, (1, 128), 600.0))
    assert found.feasible
    assert not found.within


def test_a_time_is_kept_though_chains_are_slower_than_predicted(predictor, monkeypatch):
    found, _, _ = searched(predictor, monkeypatch, Targets(None, None, 4.0, 0.05, (1, 128), 600.0))
    assert found.within
    assert all(trial.cost.speedup >= 4.0 for trial in found.trials)


def test_what_cannot_be_met_ends_with_the_nearest(predictor, monkeypatch):
    # Too small for any chain: the smallest that loses little enough is looked for.
    found, lab, clock = searched(predictor, monkeypatch, Targets(100_000, None, None, 0.05, (1, 128), 600.0))
    assert not found.feasible
    assert not found.within
    assert found.least["bytes"] > 100_000
    assert {stage for _, _, stage in lab.asked} == {"nearest", "final"}
    assert clock.seconds < 1.2 * 600
    # Small enough, but nothing so small loses so little.
    hopeless, lab, _ = searched(
        predictor, monkeypatch, Targets(9_000_000, None, None, 0.01, (1, 128), 600.0), floor=0.1
    )
    assert hopeless.feasible
    assert "nearest" in {stage for _, _, stage in lab.asked}


@pytest.mark.parametrize("most", [0.01, 0.005])
def test_the_nearest_is_looked_for_between_what_fails_and_what_holds(predictor, monkeypatch, most):
    found, _, clock = searched(predictor, monkeypatch, Targets(100_000, None, None, most, (1, 128), 600.0))
    nearest = [trial for trial in found.trials if trial.stage == "nearest"]
    enough = [trial for trial in nearest if trial.drop <= most]
    assert nearest[0].drop > most
    assert len(nearest) - nearest.index(enough[0]) == 3  # two more behind the first that loses little enough
    assert found.chain == min(enough, key=lambda trial: trial.cost.bytes).chain
    assert found.chain != enough[0].chain
    assert clock.seconds < 1.2 * 600


# Whole runs


def few_ways(monkeypatch, shapes=((0.5, None),)):
    monkeypatch.setattr(space_module, "_SHAPES", shapes)
    monkeypatch.setattr(space_module, "FORMS", FORMS[:2])
    monkeypatch.setattr(space_module, "_SEEN", (None,))


@pytest.fixture(scope="module")
def classifier():
    model = tiny_model("bert")
    rows = tiny_data(model, rows=60)
    task = lc.TextClassification(rows[36:], max_length=24)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_ways(monkeypatch)
        given = {"tokenizer": tiny_tokenizer(), "budget": "4 s", "progress": False}
        found = lc.fit(model, task, rows[:36], size="90 kB", max_drop=1.0, **given)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    return model, rows[:36], found


def test_fit_finds_a_chain_that_its_recipe_makes_again(classifier, tmp_path, reloads):
    model, rows, found = classifier
    assert found.met
    assert found.sentence.startswith("Met: at most 90.0 kB on disk")
    assert found.disk_bytes == disk_bytes(found.model) <= 90_000
    assert found.trials[-1].stage == "final"
    assert found.report.base_score.protocol["examples"] == 16
    assert "final" in str(found.table)
    assert str(found).startswith(found.sentence)
    found.recipe.to_yaml(tmp_path / "recipe.yaml")
    recipe = lc.Pipeline.from_yaml(tmp_path / "recipe.yaml")
    again = lc.compress(model, recipe, data=rows, tokenizer=tiny_tokenizer(), progress=False)
    assert disk_bytes(again.model) == found.disk_bytes
    for _ in range(2):  # what is there is its own, and written anew
        folder = found.save_pretrained(tmp_path / "model")
    verify(folder)
    assert (folder / "recipe.yaml").read_text() == (tmp_path / "recipe.yaml").read_text()
    steps = found.trials[-1].steps
    assert any("4 s" in note for note in found.notes) == (found.seconds > 4)
    assert any(f"time for {steps} steps only" in note for note in found.notes) == (steps < 20)
    assert (folder / "model.safetensors").stat().st_size == found.disk_bytes
    assert found.report.recipe == recipe.to_dict()


def test_the_verb_refuses_before_any_work(tmp_path, capsys):
    from llmcompress.cli import main

    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "rows.csv").write_text("text,label\ngood,1\nbad,0\n")
    rows = str(tmp_path / "rows.csv")
    given = ["--data", rows, "--task-data", rows, "--task", "text_classification", "--out", str(tmp_path / "out")]
    for wrong, said in (
        (["--size", "12"], "fit.size must be a quantity"),
        (["--shape", "128"], "--shape must be ROWSx"),
        (["--size", "1 kB", "--out", "/dev/null/out"], "/dev/null/out cannot be written"),
        (["--size", "1 kB", "--json", str(tmp_path / "out" / "found.json")], "must not be inside of --out"),
    ):
        assert main(["fit", str(tmp_path / "model"), *given, *wrong]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_the_verb_runs_again_in_its_folder(classifier, tmp_path, capsys, monkeypatch):
    from llmcompress.cli import main

    monkeypatch.setattr("llmcompress.fitting.fit.fit", lambda *args, **settings: classifier[2])
    (tmp_path / "rows.csv").write_text("text,label\ngood,1\nbad,0\n")
    rows, out = str(tmp_path / "rows.csv"), tmp_path / "out"
    given = ["--data", rows, "--task-data", rows, "--task", "text_classification", "--out", str(out)]
    for _ in range(2):
        assert main(["fit", "model", *given, "--size", "90 kB", "--no-progress"]) == 0
        assert f"wrote {out}" in capsys.readouterr().out
    assert lc.Pipeline.from_yaml(out / "recipe.yaml") == classifier[2].recipe


def test_what_json_has_no_number_for_is_a_word(classifier):
    found = replace(classifier[2], drop=float("inf"), noise=float("nan"))
    told = json.loads(found.to_json(), parse_constant=pytest.fail)
    assert (told["drop"], told["noise"]) == ("Infinity", "NaN")
    assert told["disk_bytes"] == found.disk_bytes


def test_an_impossible_target_ends_with_the_sentence():
    model = tiny_model("llama")
    texts = [example.text for example in tiny_data(model, rows=40)]
    task = lc.LanguageModeling(texts[20:], window=32)
    with pytest.MonkeyPatch.context() as monkeypatch:
        few_ways(monkeypatch, shapes=())
        monkeypatch.setattr(search_module, "_RELAXED", (0.5,))
        given = {"tokenizer": tiny_tokenizer(), "budget": "4 s", "progress": False}
        found = lc.fit(model, task, texts[:20], size="1 KB", max_drop=0, **given)
    assert not found.met
    assert "no chain of these strategies comes below" in found.sentence
    assert "The nearest found" in found.sentence
    assert found.disk_bytes < disk_bytes(model)
    assert any("vocabulary stays" in note for note in found.notes)
