"""Students with fewer blocks: they are the blocks kept, plain transformers loads them, what cannot be is refused."""

import copy

import pytest
import torch

import llmcompress as lc
from llmcompress.anatomy.depth import evenly_spaced, keep_blocks, origins
from llmcompress.anatomy.stacks import find_stacks
from llmcompress.compressor import Context, Cut
from llmcompress.distillation.student import choose_blocks, layer_map, make_student
from llmcompress.testing import FAMILIES, tiny_inputs, tiny_model


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
    cuts = make_student(model, "layers:" + ",".join(map(str, kept)) + ",")
    assert cuts == [Cut(path, "layers", kept, 2) for path in paths]
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
    make_student(model, "layers:1,")
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
        make_student(model, "layers:1,")
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
    history = make_student(student, "layers:0,3,5")
    assert layer_map(student, teacher, history) == [(3, 5, 6)]
    history += make_student(student, "layers:0,2")  # of what is left: blocks 0 and 5 of the teacher
    assert origins(history, "bert.encoder.layer", 2, 6) == (0, 5)
    assert layer_map(student, teacher, history) == [(5, 6)]
    assert layer_map(teacher, teacher, []) == [(1, 2, 3, 4, 5, 6)]


@pytest.mark.parametrize(
    "spec", ["layers:0", "layers:x", "layers:", "layers:-1", "layer:3", "", "layers:2,1", "layers:1,1"]
)
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
