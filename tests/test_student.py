"""Students with fewer blocks: they are the blocks kept, plain transformers loads them, what cannot be is refused."""

import copy

import pytest
import torch
import transformers

import llmcompress as lc
from llmcompress.anatomy.depth import evenly_spaced, keep_blocks, origins
from llmcompress.anatomy.digest import model_digest
from llmcompress.anatomy.stacks import find_stacks
from llmcompress.compressor import Context, Cut
from llmcompress.distillation.layer_map import layer_map
from llmcompress.distillation.student import choose_blocks, make_student, read_student
from llmcompress.testing import FAMILIES, tiny_data, tiny_inputs, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shallower_student_is_its_kept_blocks_and_loads_in_plain_transformers(family, tmp_path):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    paths = [stack.path for stack in find_stacks(model)]
    kept = (0,) if family == "t5" else (1,)  # T5's first block holds the position bias of all
    expected = copy.deepcopy(model)
    for path in paths:
        parent, _, name = path.rpartition(".")
        blocks = expected.get_submodule(path)
        setattr(expected.get_submodule(parent), name, torch.nn.ModuleList([blocks[index] for index in kept]))
    context = Context()
    assert make_student(model, "layers:" + ",".join(map(str, kept)) + ",", context) is model
    assert context.history == [Cut(path, "layers", kept, 2) for path in paths]
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits if model.can_generate() else model(**inputs).logits
        reference = expected(**inputs, use_cache=False) if model.can_generate() else expected(**inputs)
        assert torch.equal(logits, reference.logits)
        model.save_pretrained(tmp_path)
        loaded, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert torch.equal(loaded.eval()(**inputs).logits, logits)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mixtral", "opt"])
def test_a_shallower_student_generates_with_its_cache_as_without(family):
    model = tiny_model(family)
    make_student(model, "layers:1,", Context())
    prompt = tiny_inputs(model, rows=1, tokens=5)
    outputs = [model.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*outputs)


def test_lists_with_an_entry_a_block_are_cut_with_the_blocks(tmp_path):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(
        vocab_size=128, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=64, head_dim=8, layer_types=kinds, sliding_window=3, use_sliding_window=True,
        eos_token_id=[1, 2, 3, 4],
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    keep_blocks(model, {"model.layers": (0, 2)})
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.num_attention_heads == 4  # equals the old depth by chance
    assert model.config.eos_token_id == [1, 2, 3, 4]
    model.save_pretrained(tmp_path)
    inputs = {"input_ids": torch.arange(4, 28).reshape(2, 12)}
    assert torch.equal(Qwen3ForCausalLM.from_pretrained(tmp_path).eval()(**inputs).logits, model(**inputs).logits)


def test_blocks_that_cannot_stand_alone_are_refused_and_nothing_changes():
    model = tiny_model("t5")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(lc.UnsupportedModelError, match=r"relative_attention_bias.*keep block 0"):
        make_student(model, "layers:1,", Context())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.config.num_layers == 2


def test_evenly_spaced_blocks_hold_the_first_and_the_last():
    for of in range(1, 13):
        for keep in range(1, of + 1):
            blocks = evenly_spaced(of, keep)
            assert len(set(blocks)) == keep
            assert blocks == tuple(sorted(blocks))
            assert blocks[0] == 0
            assert keep == 1 or blocks[-1] == of - 1


def test_a_students_layers_answer_for_the_teachers_up_to_the_next_one_kept():
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=16)
    teacher = BertForSequenceClassification(config)
    student = copy.deepcopy(teacher)
    context = Context()
    history = context.history
    make_student(student, "layers:0,3,5", context)
    assert layer_map("auto", student, teacher, history) == [((0, 2), (1, 4), (2, 5))]
    assert layer_map("uniform", student, teacher, history) == [((0, 1), (1, 3), (2, 5))]
    assert layer_map("last", student, teacher, history) == [((2, 5),)]
    assert layer_map((0, 0, 4), student, teacher, history) == [((0, 0), (1, 0), (2, 4))]
    assert layer_map(((1, 3),), student, teacher, history) == [((1, 3),)]
    make_student(student, "layers:0,2", context)  # of what is left: blocks 0 and 5 of the teacher
    assert origins(history, "bert.encoder.layer", 2, 6) == (0, 5)
    assert layer_map("auto", student, teacher, history) == [((0, 4), (1, 5))]
    assert layer_map("auto", teacher, teacher, []) == [tuple((block, block) for block in range(6))]
    # What is about to go is mapped as if it had gone.
    planned = [Cut("bert.encoder.layer", "layers", (0, 3, 5), 6)]
    assert layer_map("auto", teacher, teacher, [], planned=planned) == [((0, 2), (1, 4), (2, 5))]


@pytest.mark.parametrize(
    "spec",
    ["layers:0", "layers:x", "layers:", "layers:-1", "layer:3", "", "layers:2,1", "layers:1,1",
     "width:1.5", "width:0", "width:x", "height:3", {}, 3],
)  # fmt: skip
def test_a_malformed_student_is_refused_on_construction(spec):
    with pytest.raises(lc.ConfigError, match=r"KnowledgeDistillation.student must"):
        lc.KnowledgeDistillation(student=spec)


@pytest.mark.parametrize("spec", ["layers:9", "layers:0,2"])
def test_a_student_outside_the_model_is_refused_in_the_plan(spec):
    model = tiny_model("bert")
    with pytest.raises(lc.ConfigError, match=r"bert.encoder.layer of BertForSequenceClassification has 2 blocks"):
        lc.KnowledgeDistillation(student=spec).plan(model, Context())
    with pytest.raises(lc.ConfigError):
        choose_blocks(model, spec)


# Narrower students


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_a_narrower_student_has_half_of_every_width_that_can_be_cut_and_learns(family, tmp_path):
    teacher = tiny_model(family)
    step = lc.KnowledgeDistillation(
        student="width:0.5", steps=20, batch_size=8, max_length=24, features={"hidden": 0.5}
    )
    result = lc.compress(teacher, step, data=tiny_data(teacher, 16), tokenizer=tiny_tokenizer(), progress=False)
    config, before = result.model.config, teacher.config
    assert config.hidden_size == before.hidden_size // 2
    assert config.num_attention_heads == before.num_attention_heads // 2
    assert result.report.steps[0].footprint.parameters < 0.5 * result.report.base.parameters
    result.save_pretrained(tmp_path / "narrow")
    again = type(teacher).from_pretrained(tmp_path / "narrow").eval()
    inputs = tiny_inputs(teacher)
    assert torch.equal(again(**inputs).logits, result.model.eval()(**inputs).logits)


def test_all_widths_of_a_model_with_few_key_heads_go_together():
    sizes = {"hidden_size": 128, "intermediate_size": 352, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = transformers.LlamaConfig(**sizes, head_dim=16, num_hidden_layers=1, vocab_size=128)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    does = [action.does for action in lc.KnowledgeDistillation(student="width:0.5").plan(model, Context())]
    assert does[:3] == ["4 -> 2 heads", "352 -> 176 FFN channels", "128 -> 64 hidden features"]


# Students that are models of their own


def test_a_student_from_a_config_is_drawn_with_the_seed_and_has_the_teachers_labels():
    model = tiny_model("bert")
    students = [
        make_student(model, read_student(fields), Context(seed=seed))
        for fields, seed in (({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}, 0),) * 2
        + (({"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}, 1),)
        + (({"model_type": "distilbert", "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}, 0),)
    ]
    first, same, other, distilbert = students
    assert (first.config.num_hidden_layers, first.config.hidden_size, first.config.vocab_size) == (1, 32, 128)
    assert torch.equal(first.bert.pooler.dense.weight, same.bert.pooler.dense.weight)
    assert not torch.equal(first.bert.pooler.dense.weight, other.bert.pooler.dense.weight)
    assert type(distilbert).__name__ == "DistilBertForSequenceClassification"
    assert distilbert.config.vocab_size == 128
    assert distilbert.config.id2label == model.config.id2label


def test_a_sibling_from_a_folder_learns_with_its_own_tokenizer(tmp_path):
    teacher = tiny_model("bert")
    body = transformers.BertModel(transformers.BertConfig(
        vocab_size=140, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    ))  # fmt: skip
    body.save_pretrained(tmp_path / "body")
    tiny_tokenizer().save_pretrained(tmp_path / "body")
    step = lc.KnowledgeDistillation(student=str(tmp_path / "body"), steps=4, max_length=24)
    result = lc.compress(teacher, step, data=tiny_data(teacher), tokenizer=tiny_tokenizer(), progress=False)
    assert type(result.model).__name__ == "BertForSequenceClassification"
    assert result.model.config.hidden_size == 32
    told = [(action.path, action.does) for action in result.report.steps[0].touched]
    assert ("classifier", "draw at random") in told
    assert told[0][1].startswith("begin from")


def test_a_sibling_in_memory_is_copied_and_a_recipe_tells_which_it_was():
    teacher, sibling = tiny_model("llama"), tiny_model("llama", seed=1)
    before = {name: tensor.clone() for name, tensor in sibling.state_dict().items()}
    step = lc.KnowledgeDistillation(student=sibling, steps=2, max_length=24)
    result = lc.compress(teacher, step, data=tiny_data(teacher), tokenizer=tiny_tokenizer(), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sibling.state_dict().items())
    assert not torch.equal(result.model.lm_head.weight, sibling.lm_head.weight)
    recipe = result.report.recipe["steps"][0]["student"]
    assert recipe == {"in_memory": "LlamaForCausalLM", "sha256": model_digest(sibling)}
    with pytest.raises(lc.ConfigError, match="was a LlamaForCausalLM in memory when the recipe was written"):
        lc.KnowledgeDistillation(student=recipe)


def test_students_from_elsewhere_that_cannot_be_are_refused_in_the_plan(tmp_path):
    def refused(error, match, student, model=None, history=()):
        context = Context(tokenizer=tiny_tokenizer(), history=list(history))
        with pytest.raises(error, match=match):
            lc.KnowledgeDistillation(student=student).plan(model or tiny_model("bert"), context)

    refused(lc.ConfigError, "student must be a folder with a model, or a name on the hub", str(tmp_path / "missing"))
    refused(lc.ConfigError, "has the field 'num_hiden_layers', which BertConfig does not know", {"num_hiden_layers": 1})
    refused(lc.ConfigError, "model_type that transformers knows, got 'bertt'", {"model_type": "bertt"})
    refused(lc.ConfigError, "builds no Bert", {"hidden_size": 30, "num_attention_heads": 4})
    refused(lc.ConfigError, "JSON file", str(tmp_path / "config.json"))
    refused(
        lc.UnsupportedModelError, "AutoModelForSequenceClassification knows no 'vit_mae'", {"model_type": "vit_mae"}
    )
    refused(lc.UnsupportedModelError, "each of the 128 tokens of its tokenizer, got 100", {"vocab_size": 100})
    cut = Cut("bert.encoder.layer", "layers", (0,), 2)
    refused(lc.ConfigError, "behind a step that cut the model", tiny_model("bert"), history=[cut])
