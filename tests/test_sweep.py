"""Sweeps: what chains share is run once, what fails is told, and any number of workers gives the same bytes."""

import itertools
import json
import types

import pytest
import torch

import llmcompress as lc
from llmcompress.cli import main
from llmcompress.registry import compressors
from llmcompress.sweeping import work
from llmcompress.sweeping.chains import allowed_orders, plan_jobs
from llmcompress.sweeping.sweep import _cost, _quality
from llmcompress.testing import tiny_model, tiny_tokenizer

TEXTS = [("a fine film", 1), ("a dull film", 0)]
HALF, INT8 = lc.MagnitudePruning(sparsity=0.5), lc.DynamicQuantization()
TRAIN = lc.KnowledgeDistillation(steps=2)
CHAINS = {
    "sparse": HALF,
    "sparse, int8": [HALF, INT8],
    "sparse, trained": [HALF, TRAIN],
    "sparse, trained, int8": [HALF, TRAIN, INT8],
    "narrow": lc.StructuredPruning(ffn=0.5),
}
# A stack cannot be told which of its blocks matter by so few tokens; that shows only when it is tried.
FAILING = {"shallow": lc.DepthPruning()}


def swept(folder, chains, **settings):
    settings = {"latency": False, "progress": False, "threads": 1, "data": TEXTS, **settings}
    task = settings.pop("task", lc.TextClassification(TEXTS))
    return lc.sweep(tiny_model("bert"), chains, task, tokenizer=tiny_tokenizer(), folder=folder, **settings)


def weights(found):
    return {name: (folder / "model.safetensors").read_bytes() for name, folder in found.folders.items()}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("sweep"), {**CHAINS, **FAILING})


@pytest.mark.parametrize("seed", range(5))
def test_jobs_run_every_step_of_every_chain_and_none_twice(seed):
    random = torch.Generator().manual_seed(seed)
    draw = lambda most: int(torch.randint(1, most, (1,), generator=random))  # noqa: E731
    chains = {
        str(number): lc.Pipeline(steps=[lc.MagnitudePruning(sparsity=draw(4) / 4) for _ in range(draw(5))])
        for number in range(6)
    }
    jobs = plan_jobs(chains)
    ran = []
    for number, job in enumerate(jobs):
        assert job.before is None or job.before < number
        begun = () if job.before is None else jobs[job.before].steps
        assert job.steps[: len(begun)] == begun
        ran += [job.steps[:count] for count in range(len(begun) + 1, len(job.steps) + 1)]
    asked = {str(chain.steps[:count]) for chain in chains.values() for count in range(1, len(chain.steps) + 1)}
    assert sorted(map(str, ran)) == sorted(asked)
    assert sorted(name for job in jobs for name in job.chains) == sorted(chains)
    assert all(chains[name].steps == job.steps for job in jobs for name in job.chains)


def test_a_sweep_makes_what_each_chain_makes_alone(here):
    for name, steps in CHAINS.items():
        alone = lc.compress(tiny_model("bert"), steps, data=TEXTS, tokenizer=tiny_tokenizer(), progress=False)
        ours, theirs = here.load(name).state_dict(), alone.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        assert here.comparison[name].report is not None
    assert (here.steps_asked, here.steps_run) == (10, 5)  # one fails


def test_a_chain_that_fails_is_told_and_the_others_go_on(here):
    assert list(here.failed) == ["shallow"]
    assert "calibration texts too short" in here.failed["shallow"]
    assert "shallow failed: MissingInputError" in str(here)
    assert "shallow failed" in here._repr_html_()
    with pytest.raises(lc.ConfigError, match="must be a chain that was finished, got 'shallow'"):
        here.load("shallow")


def test_front_and_best_are_those_of_all_pairs(here):
    entries = here.comparison.entries
    beaten = {
        one.name
        for one, other in itertools.permutations(entries, 2)
        if (_quality(other, None) >= _quality(one, None) and _cost(other, "disk") < _cost(one, "disk"))
        or (_quality(other, None) > _quality(one, None) and _cost(other, "disk") <= _cost(one, "disk"))
    }
    assert {entry.name for entry in entries} - beaten >= set(here.front())
    assert not beaten & set(here.front())
    assert _quality(here.comparison[here.best()], None) == max(
        _quality(one, None) for one in here.comparison.candidates
    )
    with pytest.raises(lc.ConfigError, match="where latency was not measured"):
        here.front("latency")
    with pytest.raises(lc.ConfigError, match="did you mean 'accuracy'"):
        here.best("acuracy")


def test_a_second_sweep_in_the_same_folder_runs_only_what_is_new(here, monkeypatch):
    folder = next(iter(here.folders.values())).parent.parent
    kept = {path: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/model.safetensors")}
    again = swept(folder, {"sparse, int8": CHAINS["sparse, int8"], "narrow, int8": [CHAINS["narrow"], INT8]})
    now = {path: path.stat().st_mtime_ns for path in (folder / "stages").glob("*/model.safetensors")}
    assert {path: now[path] for path in kept} == kept
    assert len(now) == len(kept) + 1
    assert weights(again)["sparse, int8"] == weights(here)["sparse, int8"]


def test_distillations_read_one_teacher(here):
    caches = {step.cache for chain in here.chains.values() for step in chain.flatten() if hasattr(step, "cache")}
    (cache,) = caches
    assert cache.dtype == "float32"
    folder = next(iter(here.folders.values())).parent.parent / "answers"
    assert len([path for path in folder.iterdir() if path.is_dir()]) == 1


class Odd(lc.Compressor):
    """Breaks as no step of this library does, or makes a model that answers NaN to texts alone."""

    how: str

    def plan(self, model, context):
        return [lc.Action(path="", does="breaks")]

    def compress(self, model, context):
        if self.how != "nan":
            raise KeyError(self.how)
        # The probe that models are tried on does not have the token that these texts begin with.
        first = context.tokenizer(TEXTS[0][0])["input_ids"][0]
        with torch.no_grad():
            model.get_input_embeddings().weight[first] = 3e38
        return model


@pytest.fixture
def odd(monkeypatch):
    compressors.list()  # all of the library are in before one is added for a while
    monkeypatch.setitem(compressors._classes, "odd", Odd)
    return Odd


def test_a_chain_breaks_alone_whatever_it_breaks_on(odd, tmp_path):
    chains = {"half": HALF, "half, odd, int8": [HALF, odd(how="bits"), INT8], "half, nan": [HALF, odd(how="nan")]}
    found = swept(tmp_path, chains)
    assert list(found.folders) == ["half"]
    assert [entry.name for entry in found.comparison.entries] == ["base", "half"]
    assert found.failed["half, odd, int8"] == "KeyError: 'bits'"
    assert "must return finite logits" in found.failed["half, nan"]
    assert (found.steps_asked, found.steps_run) == (6, 2)
    assert "what fails does not end" in str(found)


def test_a_sweep_of_which_nothing_is_left_has_the_base(odd, tmp_path):
    found = swept(tmp_path, {"odd": odd(how="bits"), "nan": odd(how="nan")})
    assert [entry.name for entry in found.comparison.entries] == ["base"]
    assert sorted(found.failed) == ["nan", "odd"]


@pytest.mark.slow
def test_two_workers_on_ray_give_the_same_bytes(here, tmp_path):
    pytest.importorskip("ray").init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    chains = {name: CHAINS[name] for name in ("sparse", "sparse, trained, int8", "narrow")}
    found = swept(tmp_path, chains, workers=2, on="ray")
    assert weights(found) == {name: data for name, data in weights(here).items() if name in chains}


def test_what_launchers_tell_is_not_for_a_worker(monkeypatch):
    seen = {}
    nothing = types.SimpleNamespace(go=lambda: None)
    read = lambda run: seen.update(run=run, rank=work.os.environ.get("RANK")) or nothing  # noqa: E731
    monkeypatch.setattr(work.Worker, "read", read)
    monkeypatch.setenv("RANK", "1")
    work.work_alone("folder", "name")
    assert seen["rank"] is None
    assert seen["run"].name == "name"


def test_a_worker_that_dies_is_an_error_that_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("llmcompress.sweeping.launch._WORKER", "import sys; sys.exit(3)")
    with pytest.raises(lc.CompressionError, match=r"exit status 3.*run the sweep again"):
        swept(tmp_path, {"half": HALF}, workers=2)


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"chains": {}}, lc.ConfigError, "at least one chain"),
        ({"chains": {"a": []}}, lc.ConfigError, "chain 'a' must have at least one step"),
        ({"chains": {"": HALF}}, lc.ConfigError, "that a folder can have.*got ''"),
        ({"chains": {"..": HALF}}, lc.ConfigError, r"got '\.\.'"),
        ({"chains": {"/tmp/x": HALF}}, lc.ConfigError, "got '/tmp/x'"),
        ({"chains": {"a": HALF, "a/b": INT8}}, lc.ConfigError, "got 'a/b'"),
        ({"chains": {"a\\b": HALF}}, lc.ConfigError, "that a folder can have"),
        ({"chains": {"ü" * 101: HALF}}, lc.ConfigError, "at most 200 bytes"),
        ({"chains": {1: HALF, "1": INT8}}, lc.ConfigError, "got 1 and '1'"),
        ({"chains": {"Half": HALF, "half": INT8}}, lc.ConfigError, "got 'Half' and 'half'"),
        ({"workers": 0}, lc.ConfigError, "workers must be an integer of at least 1, got 0"),
        ({"workers": "2"}, lc.ConfigError, "workers must be an integer of at least 1, got '2'"),
        ({"threads": "2"}, lc.ConfigError, "threads must be"),
        ({"seed": "x"}, lc.ConfigError, r"seed must be an integer in \[0, 2\*\*32\), got 'x'"),
        ({"latency": [(0, 8)]}, lc.ConfigError, "latency"),
        ({"task": "test.csv"}, lc.ConfigError, "task must be a Task.*got 'test.csv'"),
        ({"on": "spark"}, lc.ConfigError, "'processes' or 'ray', got 'spark'"),
        (
            {"chains": {"late": [lc.StructuredPruning(ffn=0.4), lc.WeightOnlyQuantization(bits=4, group_size=32)]}},
            lc.ConfigError,
            r"chain 'late': .*group_size=32 must divide .* has 80",
        ),
        ({"chains": {"odd": [INT8, HALF]}}, lc.PipelineOrderError, "MagnitudePruning cannot follow"),
        ({"chains": {"bad": {"name": "magnitude_prunning"}}}, lc.UnknownNameError, "did you mean"),
        ({"chains": {"none": lc.VocabularyPruning()}, "data": None}, lc.MissingInputError, "VocabularyPruning needs"),
        (
            {"chains": {"w": lc.MagnitudePruning(sparsity=0.5, targets=("no.*",))}},
            lc.NothingToCompressError,
            "chain 'w'",
        ),
    ],
)
def test_bad_input_is_refused_before_any_work(change, error, told, tmp_path):
    settings = {"chains": {"half": HALF}, **change}
    with pytest.raises(error, match=told):
        swept(tmp_path / "sweep", settings.pop("chains"), **settings)
    assert not (tmp_path / "sweep").exists()


def test_orders_are_all_that_are_allowed_and_the_best_is_one_of_them(here):
    steps = [INT8, HALF, lc.StructuredPruning(ffn=0.5)]
    found = lc.orders(
        tiny_model("bert"),
        steps,
        lc.TextClassification(TEXTS),
        tokenizer=tiny_tokenizer(),
        latency=False,
        progress=False,
    )
    assert sorted(found.folders) == [
        "magnitude_pruning, structured_pruning, dynamic_quantization",
        "structured_pruning, magnitude_pruning, dynamic_quantization",
    ]
    assert found.best() in found.folders
    with pytest.raises(lc.ConfigError, match="at most 5 steps, got 6"):
        lc.orders(tiny_model("bert"), [HALF] * 6, lc.TextClassification(TEXTS))
    with pytest.raises(lc.PipelineOrderError):
        lc.orders(tiny_model("bert"), [INT8, lc.DynamicQuantization()], lc.TextClassification(TEXTS))


def test_orders_keep_the_recovery_of_a_lone_pipeline(tmp_path):
    given = {"tokenizer": tiny_tokenizer(), "latency": False, "progress": False, "data": TEXTS}
    chain = lc.Pipeline(steps=[HALF, lc.StructuredPruning(ffn=0.5)], recover=TRAIN)
    found = lc.orders(tiny_model("bert"), chain, lc.TextClassification(TEXTS), folder=tmp_path, **given)
    assert len(found.chains) == 2
    for chain in found.chains.values():
        assert [type(step) for step in chain.flatten()][1::2] == [lc.KnowledgeDistillation] * 2
    with pytest.raises(lc.ConfigError, match=r"orders\(\) must have at least one step"):
        lc.orders(tiny_model("bert"), [], lc.TextClassification(TEXTS))
    with pytest.raises(lc.ConfigError, match="got 'spark'"):
        lc.orders(tiny_model("bert"), [HALF], lc.TextClassification(TEXTS), on="spark")


def test_orders_number_steps_of_one_kind():
    others = [lc.MagnitudePruning(sparsity=share, targets=("bert.*/x",)) for share in (0.5, 0.9)]
    assert list(allowed_orders(others)) == [
        "magnitude_pruning 1, magnitude_pruning 2",
        "magnitude_pruning 2, magnitude_pruning 1",
    ]
    assert list(allowed_orders([HALF, HALF])) == ["magnitude_pruning, magnitude_pruning"]


def test_the_command_line_sweeps_recipes(tmp_path, capsys):
    tiny_model("bert").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "test.tsv").write_text("".join(f"{text}\t{label}\n" for text, label in TEXTS))
    for name, steps in (("one", [HALF]), ("two", [HALF, INT8])):
        lc.Pipeline(steps=steps).to_yaml(tmp_path / f"{name}.yaml")
    task = ["--task", "text_classification", "--task-data", str(tmp_path / "test.tsv"), "--no-latency"]
    places = [str(tmp_path / "model"), str(tmp_path / "one.yaml"), f"small={tmp_path / 'two.yaml'}"]
    command = ["sweep", *places, *task, "--out", str(tmp_path / "out"), "--no-progress"]
    assert main([*command, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert sorted(told["folders"]) == ["one", "small"]
    assert set(told["front"]) <= {"base", "one", "small"}
    assert lc.load(tmp_path / "out" / "models" / "small").config.quantization_config
    one = ["sweep", str(tmp_path / "model"), f"../one={tmp_path / 'one.yaml'}", *task, "--out", str(tmp_path / "no")]
    assert main(one) == 2
    assert "got '../one': rename it" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
    assert not (tmp_path / "one").exists()
    assert main([*command, "--orders"]) == 2
    assert "--orders must have one recipe, got 2" in capsys.readouterr().err


def test_a_folder_that_is_a_models_own_is_refused(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    before = sorted(tmp_path.iterdir())
    chains = {"int8": lc.DynamicQuantization()}
    with pytest.raises(lc.ConfigError, match=r"folder must be one for stages and models, got .* a model's own"):
        lc.sweep(tiny_model("bert"), chains, lc.TextClassification(TEXTS), tokenizer=tiny_tokenizer(), folder=tmp_path)
    assert sorted(tmp_path.iterdir()) == before
