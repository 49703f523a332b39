"""`lc.fit`: targets, the solver against all choices, a search on a clock of its own, whole runs on tiny models."""

import gc
import itertools
import json
import time
import weakref
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Cache, T5Config, T5ForConditionalGeneration

import llmcompress as lc
from llmcompress.anatomy.footprint import disk_bytes
from llmcompress.anatomy.stacks import Stack
from llmcompress.checkpoint import verify
from llmcompress.class_labels import ClassIndex
from llmcompress.compressor import Context
from llmcompress.data import load_examples
from llmcompress.evaluation.tasks import ExampleResult, MetricKind, TaskScore
from llmcompress.fitting import bench as bench_module
from llmcompress.fitting import budget as budget_module
from llmcompress.fitting import search as search_module
from llmcompress.fitting import space as space_module
from llmcompress.fitting import survey as survey_module
from llmcompress.fitting.bench import Bench
from llmcompress.fitting.blocks import BlockTimer
from llmcompress.fitting.budget import Budget
from llmcompress.fitting.chain import chain_of
from llmcompress.fitting.holdout import hold_out
from llmcompress.fitting.outcome import sentence_of
from llmcompress.fitting.predictor import Predictor, calibrated
from llmcompress.fitting.recovery import find_recovery
from llmcompress.fitting.search import Search
from llmcompress.fitting.solver import BlockWay, Problem, RestWay, Skeleton, Solution, solve
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
    batches = survey_module.texts_of(model, Context(data=[lc.Example("ab")] * 40, tokenizer=tiny_tokenizer()), 4)
    assert sum(batch["input_ids"].numel() for batch in batches) == 32
    with pytest.raises(lc.MissingInputError, match="9 texts have 18 tokens in all"):
        survey_module.texts_of(model, Context(data=[lc.Example("ab")] * 9, tokenizer=tiny_tokenizer()), 4)


def test_labels_that_only_some_rows_have_are_told(tmp_path):
    model, notes = tiny_model("bert"), []
    rows = [lc.Example("text", label=1), lc.Example("text"), lc.Example("text", label=0)]
    task = lc.TextClassification([("text", 0)])
    recovery, _ = find_recovery(model, task, rows, tiny_tokenizer(), str(tmp_path), 3, notes)
    assert recovery.alpha == 1.0
    assert notes == ["labels are not trained on: 1 of 3 examples have none"]
    find_recovery(model, task, rows[1:2], tiny_tokenizer(), str(tmp_path), 3, notes)
    assert len(notes) == 1


@pytest.mark.parametrize(("most_rows", "spans", "epochs"), [(40, None, 12), (79, None, 12), (80, 1, 12), (999, 5, 18)])
def test_texts_are_joined_by_their_spans_where_the_teacher_has_time_for_them(most_rows, spans, epochs, tmp_path):
    model = tiny_model("bert")
    rows = [lc.Example("some words of a text", label=1)] * 40
    task = lc.TextClassification([("text", 0)])
    recovery, most_steps = find_recovery(model, task, rows, tiny_tokenizer(), str(tmp_path), most_rows, [])
    assert (recovery.augment and recovery.augment.copies) == spans
    # A span has no label; the teacher alone says what it is.
    assert recovery.alpha == (0.5 if spans is None else 1.0)
    assert most_steps == epochs * 40 / 16
    words = tiny_model("llama")
    recovery, _ = find_recovery(words, lc.LanguageModeling(["a text"]), rows, tiny_tokenizer(), str(tmp_path), 999, [])
    assert recovery.augment is None


def test_there_are_no_more_spans_than_the_answers_have_room_for(tmp_path, monkeypatch):
    model, task = tiny_model("bert"), lc.TextClassification([("text", 0)])
    rows = [lc.Example("some words of a text", label=1)] * 40
    one = len(lc.data.encode(rows[:1], tiny_tokenizer())[0]["input_ids"]) * 40 * model.config.hidden_size * 4
    for room, spans, features in ((2.3, 2, True), (1.1, None, True), (0.9, 5, False)):
        monkeypatch.setattr("llmcompress.fitting.recovery._MOST_BYTES", room * one)
        recovery, _ = find_recovery(model, task, rows, tiny_tokenizer(), str(tmp_path), 999, [])
        assert (recovery.augment and recovery.augment.copies, bool(recovery.features)) == (spans, features)


def test_an_original_without_a_score_is_refused():
    model = tiny_model("bert")
    model.config.num_labels, model.config.problem_type = 1, "regression"
    model.classifier = torch.nn.Linear(model.config.hidden_size, 1)
    rows = [(f"text {index}", 2.0) for index in range(12)]
    with pytest.raises(lc.ConfigError, match=r"fit\.task must give the original a finite pearson, got nan on the 4 ex"):
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
    with pytest.raises(lc.CompressionError, match="its perplexity is inf"):
        bench.run(Untouched(), 0, "short")


def test_chains_of_one_name_have_costs_of_their_own(monkeypatch):
    context, targets = Context(tokenizer=tiny_tokenizer()), Targets(1000, None, None, 0.05, (1, 128), 600.0)
    bench = Bench(tiny_model("bert"), context, None, targets, None, None, 1.0, 0, Budget(600.0, progress=False))
    made = []
    monkeypatch.setattr(
        bench_module, "make", lambda model, steps, context: made.append(steps) or SimpleNamespace(model=0)
    )
    monkeypatch.setattr(Bench, "_measured", lambda bench, model, share: Cost(len(made)))
    chains = [
        SimpleNamespace(name="4 and 8 bits packed", steps=lambda bits=bits: [lc.WeightOnlyQuantization(bits=bits)])
        for bits in (4, 8)
    ]
    assert [bench.cost(chain).bytes for chain in (*chains, *chains)] == [1, 2, 1, 2]


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
    ended = SimpleNamespace(feasible=True, least={})
    told = sentence_of(targets, ended, Cost(2000, 1.0, 1.0), final, perplexity_of(2.0), met=False)
    assert "cannot be shown to lose no more than 0.0004" in told
    assert told.endswith("the loss of perplexity cannot be told (inf).")
    # Each limit can be kept, and not both of them.
    ended = SimpleNamespace(feasible=False, least={"bytes": 500.0, "ms": 0.0005})
    told = sentence_of(targets, ended, Cost(2000, 1.0, 1.0), final, perplexity_of(2.0), met=False)
    assert "no chain of these strategies is expected to be so small and so fast at once. The nearest" in told
    ended = SimpleNamespace(feasible=False, least={"bytes": 1500.0, "ms": 0.0005})
    told = sentence_of(targets, ended, Cost(2000, 1.0, 1.0), final, perplexity_of(2.0), met=False)
    assert "no chain of these strategies comes below 1.50 kB. The nearest" in told


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


def test_a_smaller_vocabulary_alone_is_a_choice():
    ways = [[BlockWay(0, 0, 32, 0.0, 10, 1.0)] for _ in range(2)]
    rests = [RestWay(0, 0, 32, 0.0, 20, 0.0), RestWay(1, 0, 32, 0.1, 5, 0.0)]
    problem = Problem(ways, [9.0, 9.0], [0.0, 0.0], [(0, 1)], rests)
    for limits in ({}, {"bytes": 30.0}):
        found = solve(problem, limits, excluded=[problem.unchanged])
        assert (sorted(found.kept), found.rest) == ([0, 1], rests[1])
    # A skeleton without a vocabulary is one with any.
    found = solve(problem, {}, excluded=[problem.unchanged, replace(problem.unchanged, vocabulary=None)])
    assert len(found.kept) == 1


def test_a_block_that_must_stay_does():
    problem = random_problem(np.random.default_rng(1))
    free = solve(problem, {}, minimise="bytes")
    gone = next(block for block in range(3) if block not in free.kept)
    held = solve(replace(problem, fixed=[gone]), {}, minimise="bytes")
    assert gone in held.kept
    assert held.bytes > free.bytes


def test_a_decoder_that_may_be_no_deeper_than_its_encoder_is_not():
    rest = [RestWay(0, 0, 32, 0.0, 1, 0.0)]
    ways = [[BlockWay(0, 0, 32, 0.0, 10, 1.0)] for _ in range(6)]
    # The encoder's blocks, the first three, do less than the decoder's.
    problem = Problem(ways, [0.1] * 3 + [0.2] * 3, [0.0] * 5, [range(3), range(3, 6)], rest)
    for tapers, depths in ((False, (1, 3)), (True, (2, 2))):
        found = solve(replace(problem, tapers=tapers), {"bytes": 41.0})
        assert (sum(block < 3 for block in found.kept), sum(block >= 3 for block in found.kept)) == depths


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
        lc.fit(model, task, ["text"] * 40, size="1 kB", budget="60 s", tokenizer=tiny_tokenizer(), progress=False)
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

    def of(model, shapes=((None, 0.5),), looking=float("inf")):
        monkeypatch.setattr(space_module, "_SHAPES", shapes)
        data = [example.text for example in tiny_data(model, rows=8)]
        context = Context(data=load_examples(data), tokenizer=tiny_tokenizer(), teacher=model, device=model.device)
        space = space_module.find_space(model, context)
        monkeypatch.setattr(survey_module, "_LOOKING", looking)
        budget = Budget(1.0, progress=False)
        return Predictor(space, survey_module.survey(model, space, context, [], (1, 8), budget)), space

    return of


def test_what_turns_out_to_be_impossible_is_left_out_and_told(surveyed):
    # Its plan says that heads can go, and it does not run with fewer of them.
    predictor, space = surveyed(tiny_model("phi3"))
    assert len(space.shapes) == 2
    assert {way.shape for ways in predictor.problem().blocks for way in ways} == {0}
    assert any("is left out: Phi3ForCausalLM does not run" in note for note in space.notes)


@pytest.mark.parametrize("heads", [4, 6, 12])
def test_t5_is_packed_and_loses_heads_whatever_their_number(surveyed, heads):
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128, d_model=64, d_kv=8, d_ff=128, num_layers=2, num_heads=heads, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config).eval()
    predictor, space = surveyed(model)
    problem = predictor.problem()
    # Its table of positions is a head wide, and no whole groups.
    assert predictor.forms == list(FORMS)
    # Its first block hands the others a bias of one row a head: widths are judged of all blocks together, and it stays.
    assert {way.shape for ways in problem.blocks for way in ways} == {0, 1}
    assert space.fixed == [0, 2]
    assert problem.tapers
    assert any(note.startswith("encoder.block stays as deep as decoder.block: ") for note in space.notes)
    assert any(note.startswith("encoder.block.0 stays: blocks [1] of encoder.block") for note in space.notes)
    way = next(own for own in problem.blocks[0] if (own.shape, own.bits) == (1, 4))
    kept = dict.fromkeys((0, 2) if heads == 4 else range(4), way)
    rest = next(own for own in problem.rests if own.bits == 4)
    chain = chain_of(predictor, Solution(kept, rest, 0.0, 0.0, 0.0))
    data = [example.text for example in tiny_data(model, rows=8)]
    made = lc.compress(model, chain.steps(), data=data, tokenizer=tiny_tokenizer(), progress=False).model
    assert made.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape == (32, heads // 2)
    assert (len(made.encoder.block), disk_bytes(made) < 0.3 * disk_bytes(model)) == (len(kept) // 2, True)


def test_what_breaks_in_the_survey_is_left_out_and_told(surveyed, monkeypatch):
    model, make = tiny_model("bert"), survey_module.make

    def broken(given, steps, context):
        if isinstance(steps[0], lc.DynamicQuantization) and steps[0].targets and given is not model:
            raise RuntimeError("no kernel\nfor 64 channels")
        if isinstance(steps[0], lc.WeightOnlyQuantization) and steps[0].targets is None and steps[0].bits == 4:
            raise MemoryError
        return make(given, steps, context)

    monkeypatch.setattr(survey_module, "make", broken)
    predictor, space = surveyed(model, shapes=((0.5, None),))
    problem = predictor.problem()
    # int8 breaks behind the narrower widths, and 4 bits everywhere.
    assert {(way.shape, way.scheme) for way in problem.blocks[0]} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 2)}
    assert {way.bits for ways in (*problem.blocks, problem.rests) for way in ways} == {32, 8}
    assert any(
        note.startswith("no int8 weights of 8 bits behind StructuredPruning(ffn=0.5")
        and note.endswith("): RuntimeError: no kernel")
        for note in space.notes
    )
    assert "no packed weights of 4 bits: MemoryError" in space.notes
    assert any("the task has no texts to try a smaller one on" in note for note in space.notes)
    assert solve(problem, {}, minimise="bytes").skeleton.scheme == 2


def test_what_there_is_no_time_to_look_at_is_told(surveyed):
    predictor, space = surveyed(tiny_model("bert"), shapes=((0.5, None), (0.75, None)), looking=0.0)
    assert predictor.shapes == [Shape()]
    assert not predictor.complete
    assert any(note.count("StructuredPruning(ffn=0.") == 2 and "no time to look" in note for note in space.notes)


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
        ms = self.times.setdefault(chain.name, 1.2 * sum(self.predictor.surveyed(solution)))
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
    lab.run(found.chains[0], lab.steps_in(found.chains[0], budget.left()), "final")
    return found, lab, clock


def unrun(predictor, monkeypatch, ms):
    """Return a search for chains of at most so many milliseconds, which is not run, and its lab."""
    clock = Clock()
    monkeypatch.setattr(budget_module, "now", clock)
    targets, lab = Targets(None, ms, None, 0.05, (1, 128), 600.0), FakeLab(clock, predictor)
    return Search(predictor, lab, targets, Cost(58_000_000, 10.0, 1.0), Budget(600.0, progress=False)), lab


def test_times_of_chains_are_learned_from_those_that_were_measured(predictor):
    # What really is: a rest of 0.2 ms, blocks that take 1.5 times as long as surveyed, the narrow ones 1.2 times.
    def real(solution):
        _, blocks = predictor.surveyed(solution)
        return 0.2 + (1.5, 1.2)[solution.skeleton.shape] * blocks

    def chain(count, shape):
        scheme = predictor.forms[1].number
        blocks = predictor.problem().blocks
        kept = {
            number: next(way for way in blocks[number] if (way.shape, way.scheme) == (shape, scheme))
            for number in range(count)
        }
        rest = next(rest for rest in predictor.problem().rests if rest.scheme == scheme)
        return Solution(kept, rest, 0.0, 0.0, sum(way.ms for way in kept.values()) + rest.ms)

    assert chain(2, 0).ms == pytest.approx(sum(predictor.surveyed(chain(2, 0))))
    predictor.time_of(chain(2, 0), real(chain(2, 0)))
    assert chain(2, 0).ms == pytest.approx(real(chain(2, 0)), rel=0.02)
    # Of one depth it is not known what is the rest and what the blocks: the other depth tells.
    predictor.time_of(chain(4, 0), real(chain(4, 0)))
    for count in range(2, 7):
        assert chain(count, 0).ms == pytest.approx(real(chain(count, 0)), rel=0.05)
    # A shape not measured is thought to be like the others; one measured has its own factor.
    blocks = [predictor.surveyed(chain(3, shape))[1] for shape in (0, 1)]
    assert (chain(3, 0).ms - chain(3, 0).rest.ms) / blocks[0] == (
        pytest.approx((chain(3, 1).ms - chain(3, 1).rest.ms) / blocks[1], rel=0.02)
    )
    predictor.time_of(chain(3, 1), real(chain(3, 1)))
    for count, shape in itertools.product((2, 5), (0, 1)):
        assert chain(count, shape).ms == pytest.approx(real(chain(count, shape)), rel=0.08)


def test_one_absurd_time_makes_nothing_free(predictor):
    first = solve(predictor.problem(), {"ms": 4.0}, vocabulary=0)
    for _ in range(3):
        predictor.time_of(first, 1e-3)
    again = solve(predictor.problem(), {"ms": 4.0}, vocabulary=0)
    assert all(way.ms > 0 for way in again.kept.values())
    assert again.rest.ms > 0


def test_what_was_too_slow_comes_again_within_wider_limits(predictor, monkeypatch):
    search, _ = unrun(predictor, monkeypatch, 4.0)
    search._proposals({"ms": 4.0}, 2)
    assert search._slow
    assert search._too_slow({"ms": 4.0}) == set(search._slow)
    assert not search._too_slow({"ms": 2 * max(search._slow.values())})
    # Without a limit on the time, as where only bytes are asked for.
    assert not search._too_slow({"bytes": 1e6})


def test_what_few_examples_say_is_drawn_towards_what_is_expected(predictor, monkeypatch):
    search, _ = unrun(predictor, monkeypatch, 6.0)
    chains = search._proposals({"ms": 6.0}, 3)
    harms = sorted(chains, key=lambda chain: sum(predictor.damages(chain.solution).values()))
    harmless, harmful = harms[0], harms[-1]

    def ranked(noise, first, second):
        cost = Cost(1, 1.0, 2.0)
        trials = [
            Trial(chain, "short", 50, cost, drop, noise, 1.0) for chain, drop in ((harmless, first), (harmful, second))
        ]
        failed = Trial.failed(harmless, "short", ValueError("broken"), seconds=1.0)
        return [trial.chain for trial in search._likely([failed, *trials])]

    # A point of accuracy less, which hundreds of examples do not tell: the chain that cuts less is likely the better.
    assert ranked(0.03, 0.030, 0.020) == [harmless, harmful]
    # Told without noise, or by far, it counts.
    assert ranked(0.0, 0.030, 0.020) == [harmful, harmless]
    assert ranked(0.03, 0.30, 0.02) == [harmful, harmless]
    assert search._likely([]) == []


def test_evenly_spread_blocks_are_as_fast_and_judged_as_those_that_the_solver_chose(predictor, monkeypatch):
    search, lab = unrun(predictor, monkeypatch, 2.0)
    chosen, even = search._proposals({"ms": 2.0}, 4)[:2]
    assert chosen.solution.skeleton == even.solution.skeleton
    assert sorted(even.solution.kept) == list(search_module.spread(6, len(even.solution.kept)))
    assert sum(predictor.damages(even.solution).values()) > sum(predictor.damages(chosen.solution).values())
    found = [Trial(one, "short", 50, lab.cost(one), drop, 0.03, 1.0) for one, drop in ((chosen, 0.021), (even, 0.02))]
    assert [trial.chain for trial in search._likely(found)] == [even, chosen]


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
    assert found.chains[0].solution.bytes <= 9_000_000
    best = min((trial for trial in found.trials if trial.stage == "longer"), key=lambda trial: trial.drop)
    assert found.chains[0] == best.chain
    # The next best stand by, each once.
    assert len(found.chains) == 3
    assert all(chain in [trial.chain for trial in found.trials] for chain in found.chains)
    assert len({chain.name for chain in found.chains}) == 3


def test_of_few_data_several_chains_are_tried_too(predictor, monkeypatch):
    steps_in = FakeLab.steps_in
    monkeypatch.setattr(FakeLab, "steps_in", lambda lab, chain, seconds: min(steps_in(lab, chain, seconds), 15))
    _, lab, _ = searched(predictor, monkeypatch, Targets(9_000_000, None, None, 0.05, (1, 128), 600.0))
    assert [stage for _, _, stage in lab.asked].count("short") >= 4


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
    assert all(trial.cost.speedup < 4.0 for trial in found.trials)


def test_a_time_is_kept_though_chains_are_slower_than_predicted(predictor, monkeypatch):
    found, _, _ = searched(predictor, monkeypatch, Targets(None, None, 4.0, 0.05, (1, 128), 600.0))
    assert found.trials
    assert all(trial.cost.speedup >= 4.0 for trial in found.trials)


def test_what_cannot_be_met_ends_with_the_nearest(predictor, monkeypatch):
    # Too small for any chain: the smallest that loses little enough is looked for.
    found, lab, clock = searched(predictor, monkeypatch, Targets(100_000, None, None, 0.05, (1, 128), 600.0))
    assert not found.feasible
    assert found.chains[0].solution.bytes > 100_000
    assert found.least["bytes"] > 100_000
    assert {stage for _, _, stage in lab.asked} == {"nearest", "final"}
    assert clock.seconds < 1.2 * 600
    # Small enough, but nothing so small loses so little.
    hopeless, lab, _ = searched(
        predictor, monkeypatch, Targets(9_000_000, None, None, 0.01, (1, 128), 600.0), floor=0.1
    )
    assert hopeless.feasible
    assert "nearest" in {stage for _, _, stage in lab.asked}


class BrittleLab(FakeLab):
    """Breaks where it is told to, on the chains that it is told to."""

    def __init__(self, clock, predictor, where, which, error):
        super().__init__(clock, predictor)
        self.where, self.which, self.error, self.seen = where, which, error, []

    def broken(self, where, chain):
        if chain.name not in self.seen:
            self.seen.append(chain.name)
        if where == self.where and self.which(self.seen.index(chain.name)):
            raise self.error

    def cost(self, chain):
        self.broken("cost", chain)
        return super().cost(chain)

    def steps_in(self, chain, seconds):
        self.broken("steps_in", chain)
        return super().steps_in(chain, seconds)

    def run(self, chain, steps, stage):
        self.broken("run", chain)
        return super().run(chain, steps, stage)


def searched_brittle(predictor, monkeypatch, where, which, error, progress=False):
    clock = Clock()
    monkeypatch.setattr(budget_module, "now", clock)
    budget = Budget(600.0, progress=progress)
    lab = BrittleLab(clock, predictor, where, which, error)
    targets = Targets(9_000_000, None, None, 0.05, (1, 128), 600.0)
    found = Search(predictor, lab, targets, Cost(58_000_000, 10.0, 1.0), budget).run()
    budget.close()
    return found, lab, clock


@pytest.mark.parametrize("where", ["cost", "steps_in", "run"])
def test_a_chain_that_breaks_takes_no_other_with_it(predictor, monkeypatch, capsys, where):
    error = RuntimeError("out of memory\nTried to allocate")
    found, lab, clock = searched_brittle(
        predictor, monkeypatch, where, lambda number: number == 0, error, progress=True
    )
    broken = [trial for trial in found.trials if trial.error]
    assert [(trial.chain.name, trial.error) for trial in broken] == [(lab.seen[0], "RuntimeError: out of memory")]
    assert broken[0].cause is error
    assert (broken[0].cost is None) == (where != "run")
    assert f"fit: {lab.seen[0]} failed: RuntimeError: out of memory\n" in capsys.readouterr().err
    assert found.feasible
    assert found.chains[0].name != lab.seen[0]
    assert {"short", "longer"} == {trial.stage for trial in found.trials if trial.drop is not None}
    assert clock.seconds < 1.2 * 600


@pytest.mark.parametrize("where", ["cost", "steps_in", "run"])
def test_a_search_of_which_all_breaks_ends_without_a_chain(predictor, monkeypatch, where):
    found, _, _ = searched_brittle(predictor, monkeypatch, where, lambda number: True, ValueError("no such label"))
    assert not found.chains
    assert len(found.trials) > 4
    assert {trial.error for trial in found.trials} == {"ValueError: no such label"}
    with pytest.raises(KeyboardInterrupt):
        searched_brittle(predictor, monkeypatch, where, lambda number: True, KeyboardInterrupt())


def test_of_a_chain_that_broke_nothing_stays_in_memory():
    def run():
        model = torch.nn.Linear(2, 2)
        held.append(weakref.ref(model))
        try:
            raise RuntimeError("first")
        except RuntimeError:
            raise ValueError("then") from None

    held = []
    try:
        run()
    except ValueError as error:
        trial = Trial.failed(SimpleNamespace(name="int8"), "short", error, seconds=1.0)
    gc.collect()
    assert held[0]() is None
    assert (trial.error, trial.drop) == ("ValueError: then", None)
    assert trial.cause.__traceback__ is not None


@pytest.mark.parametrize("most", [0.01, 0.005])
def test_the_nearest_is_looked_for_between_what_fails_and_what_holds(predictor, monkeypatch, most):
    found, _, clock = searched(predictor, monkeypatch, Targets(100_000, None, None, most, (1, 128), 600.0))
    nearest = [trial for trial in found.trials if trial.stage == "nearest"]
    enough = [trial for trial in nearest if trial.drop <= most]
    assert nearest[0].drop > most
    assert len(nearest) - nearest.index(enough[0]) == 3  # two more behind the first that loses little enough
    assert found.chains[0] == min(enough, key=lambda trial: trial.cost.bytes).chain
    assert found.chains[0] != enough[0].chain
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
        given = {"tokenizer": tiny_tokenizer(), "budget": "60 s", "progress": False}
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
    assert any("was 60 s" in note for note in found.notes) == (found.seconds > 60)
    assert any(f"time for {steps} step" in note for note in found.notes) == (steps < 20)
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
        (["--size", "12"], "size must be a quantity"),
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
        given = {"tokenizer": tiny_tokenizer(), "budget": "60 s", "progress": False}
        found = lc.fit(model, task, texts[:20], size="1 KB", max_drop=0, **given)
    assert not found.met
    assert "no chain of these strategies comes below" in found.sentence
    assert "The nearest found" in found.sentence
    assert found.disk_bytes < disk_bytes(model)
    assert any("vocabulary stays" in note for note in found.notes)


@dataclass(frozen=True, eq=False)
class Fussy(lc.TextClassification):
    """A user's own task, which does not bear every model or example."""

    spared: int = 0
    text: str = ""
    name = "fussy"

    def evaluate(self, model, *args, **settings):
        if id(model) != self.spared or any(one.text == self.text for one in self.examples):
            raise KeyError("label\nof mine")
        return super().evaluate(model, *args, **settings)


def fussy(monkeypatch, **settings):
    """Return a model, its rows, and what fits it with such a task and without training."""
    few_ways(monkeypatch)
    monkeypatch.setattr("llmcompress.fitting.fit.find_recovery", lambda *given: (None, 0))
    model = tiny_model("bert")
    rows = tiny_data(model, rows=60)
    task = Fussy([*rows[36:], lc.Example("the last one", label=0)], max_length=24, spared=id(model), **settings)
    given = {"tokenizer": tiny_tokenizer(), "budget": "60 s", "max_drop": 1.0, "progress": False}
    return lambda size="90 kB": lc.fit(model, task, rows[:36], size=size, **given)


@pytest.mark.parametrize("part", [0, 1])
def test_a_task_that_breaks_on_the_original_stops_before_any_work(monkeypatch, part):
    monkeypatch.setattr("llmcompress.fitting.fit.find_space", lambda *given: pytest.fail("work has begun"))
    rows = [*tiny_data(tiny_model("bert"), rows=60)[36:], lc.Example("the last one", label=0)]
    text = hold_out(lc.TextClassification(rows), seed=0)[part].examples[0].text
    with pytest.raises(KeyError, match="of mine"):
        fussy(monkeypatch, text=text)()


def test_a_task_that_breaks_on_every_chain_ends_in_one_error(monkeypatch):
    with pytest.raises(lc.CompressionError, match=r"all \d+ runs of chains for BertFor.*, with: KeyError: ") as caught:
        fussy(monkeypatch)()
    assert isinstance(caught.value.__cause__, KeyError)
    assert not isinstance(caught.value, lc.NothingToCompressError)


def test_where_the_last_training_breaks_the_next_best_chain_takes_its_place(monkeypatch):
    monkeypatch.setattr(Fussy, "evaluate", lc.TextClassification.evaluate)
    final, asked = Bench.final, []

    def brittle(bench, chain, *given):
        asked.append(chain.name)
        if len(asked) == 1:
            raise MemoryError
        return final(bench, chain, *given)

    monkeypatch.setattr(Bench, "final", brittle)
    found = fussy(monkeypatch)()
    assert len(set(asked)) == 2
    assert [trial.chain.name for trial in found.trials if trial.stage == "final"] == asked
    assert found.trials[-2].error == "MemoryError"
    assert f"{asked[0]} failed: MemoryError" in str(found)
    assert found.met


def test_a_budget_that_scores_alone_would_fill_is_refused(monkeypatch):
    monkeypatch.setattr("llmcompress.fitting.fit.find_space", lambda *given: pytest.fail("work has begun"))
    clock = Clock()
    monkeypatch.setattr(budget_module, "now", clock)
    evaluate = lc.TextClassification.evaluate

    def slow(task, *given, **settings):
        clock.seconds += len(task.examples)
        return evaluate(task, *given, **settings)

    monkeypatch.setattr(lc.TextClassification, "evaluate", slow)
    model = tiny_model("bert")
    rows = tiny_data(model, rows=30)
    given = {"size": "90 kB", "tokenizer": tiny_tokenizer(), "progress": False}
    # 10 s for those that decide and 20 s for the others, on the original; then 10 s, and 20 s for five stages.
    with pytest.raises(
        lc.ConfigError, match=r"fit\.budget must be at least about 280 s for Bert.*, got 120 s: .* 30\.0 s"
    ):
        lc.fit(model, lc.TextClassification(rows), rows, budget="2 min", **given)
