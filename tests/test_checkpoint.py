"""Folders: what is written, that it is written whole or not at all, and that damage is told."""

import json

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import llmcompress as lc
from llmcompress.checkpoint import load, read_metadata, save, verify
from llmcompress.testing import tiny_inputs, tiny_model, tiny_tokenizer


@torch.no_grad()
def logits(model):
    return model(**tiny_inputs(model)).logits


@pytest.fixture(scope="module")
def model():
    return lc.DynamicQuantization().compress(tiny_model("llama"), lc.Context())


@pytest.fixture
def folder(tmp_path, model):
    return save(model, tmp_path / "checkpoint", tokenizer=tiny_tokenizer(), metadata={"recipe": [{"name": "x"}]})


def test_a_folder_comes_back_whole(folder, model):
    assert torch.equal(logits(load(folder)), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(folder)), logits(model))
    assert type(load(folder, model_class=AutoModel)).__name__ == "LlamaModel"
    assert not load(folder).training
    assert AutoTokenizer.from_pretrained(folder).vocab_size == 128
    metadata = verify(folder)
    assert metadata["recipe"] == [{"name": "x"}]
    assert metadata["format_version"] == 1
    assert set(metadata["files"]) == {path.name for path in folder.iterdir()} - {"llmcompress.json"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_float_model_keeps_its_dtype(tmp_path):
    tiny = tiny_model("qwen2").to(torch.bfloat16)
    assert load(save(tiny, tmp_path / "deep" / "er", metadata={})).dtype == torch.bfloat16


def test_an_earlier_checkpoint_is_replaced_and_nothing_else(folder, model, tmp_path):
    save(model, folder, metadata={"recipe": []})
    assert read_metadata(folder)["recipe"] == []
    assert not (folder / "tokenizer.json").exists()

    (folder / "notes.md").write_text("mine")
    with pytest.raises(lc.CheckpointError, match=r"notes\.md"):
        save(model, folder, metadata={})
    assert (folder / "notes.md").read_text() == "mine"

    plain = tmp_path / "plain"
    tiny_model("llama").save_pretrained(plain)
    with pytest.raises(lc.CheckpointError, match="not a checkpoint of llmcompress"):
        save(model, plain, metadata={})
    (tmp_path / "file").write_text("")
    with pytest.raises(lc.CheckpointError, match="must be a folder, got a file"):
        save(model, tmp_path / "file", metadata={})


def test_a_save_that_fails_leaves_everything_as_it_was(folder, model, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    for target in (folder, folder.with_name("new")):
        with pytest.raises(lc.CheckpointError, match="cannot be written: no space left"):
            save(model, target, metadata={})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("metadata", [{"weights": 1}, {"format_version": 2}, {"recipe": object()}])
def test_bad_metadata_is_refused_before_anything_is_written(model, tmp_path, metadata):
    with pytest.raises(lc.CheckpointError, match="metadata must"):
        save(model, tmp_path / "x", metadata=metadata)
    assert list(tmp_path.iterdir()) == []


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def edit(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, r"model\.safetensors is damaged: it must have \d+ bytes"),
        (flip_a_bit, r"model\.safetensors is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda folder: (folder / "llmcompress.json").write_text("[]"), "must hold a JSON object, got list"),
        (edit("llmcompress.json", format_version=99), "upgrade it with pip"),
        (edit("llmcompress.json", format_version="1"), "must have a format_version"),
        (edit("llmcompress.json", weights=None), "must list files and weights"),
        (edit("llmcompress.json", weights={"../secret": {}}), "must name files of the folder"),
        (edit("config.json", architectures=["NoSuchModel"]), "has no class 'NoSuchModel'"),
        (edit("config.json", hidden_size=72), r"no model\.embed_tokens\.weight of the shape \(128, 72\)"),
        (edit("config.json", quantization_config={"quant_method": "llmcompress"}), "list of groups"),
    ],
)
def test_damage_is_told_by_file(folder, damage, words):
    damage(folder)
    with pytest.raises(lc.CheckpointError, match=words):
        load(folder)


def test_a_plain_hugging_face_folder_loads_but_cannot_be_verified(folder, model):
    (folder / "llmcompress.json").unlink()
    assert type(load(folder)) is type(model)
    with pytest.raises(lc.CheckpointError, match="is not a checkpoint of llmcompress"):
        verify(folder)


def test_what_is_no_folder_is_refused(tmp_path):
    for nowhere in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(lc.CheckpointError, match="there is no such folder"):
            load(nowhere)
    with pytest.raises(lc.CheckpointError, match=r"it holds neither llmcompress\.json nor"):
        load(tmp_path)
    with pytest.raises(lc.CheckpointError, match=r"has no llmcompress\.json"):
        verify(tmp_path)


# -- places and what lies beside the weights ------------------------------------------------------------------------


def test_a_link_stays_one_and_its_target_is_written(model, tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    target.mkdir()
    link.symlink_to(target)
    for _ in range(2):
        assert save(model, link, metadata={}) == link
        assert link.is_symlink()
        assert torch.equal(logits(load(target)), logits(model))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target"]


def test_the_folder_that_the_process_works_in_is_not_replaced(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lc.CheckpointError, match="name a folder in it"):
        save(model, ".", metadata={})
    assert list(tmp_path.iterdir()) == []
    save(model, "small", metadata={})
    verify("small")


def test_several_chat_templates_come_back(model, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    folder = save(model, tmp_path / "small", tokenizer=tokenizer, metadata={})
    assert load(folder).training is False
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    save(model, folder, tokenizer=tokenizer, metadata={})


def test_what_makes_inputs_of_images_goes_along(tmp_path):
    source = tmp_path / "in"
    tiny_model("llama").save_pretrained(source)
    (source / "preprocessor_config.json").write_text('{"size": 8}')
    result = lc.compress(source, lc.MagnitudePruning(), progress=False)
    result.save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 8}'
    verify(tmp_path / "out")
    lc.compress_checkpoint(source, tmp_path / "streamed", lc.MagnitudePruning(), progress=False)
    assert (tmp_path / "streamed" / "preprocessor_config.json").is_file()


def test_no_file_of_the_working_folder_goes_along(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert not (save(model, "small", metadata={}) / "preprocessor_config.json").exists()


def test_what_transformers_refuses_to_save_is_told(tmp_path):
    model = tiny_model("llama")
    model.generation_config.temperature = 0.5
    with pytest.raises(lc.CheckpointError, match=r"(?s)cannot be saved, and is as it was.*model\.generation_config"):
        save(model, tmp_path / "small", metadata={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "edit", [{"files": 5}, {"files": None}, {"files": [5]}, {"weights": {"..": None}}, {"weights": {"a": 5}}]
)
def test_edited_metadata_is_damage(folder, model, edit):
    file = folder / "llmcompress.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **edit}))
    for work in (load, lambda where: save(model, where, metadata={})):
        with pytest.raises(lc.CheckpointError, match="must list files and weights; it is damaged"):
            work(folder)


def test_parts_in_a_wider_dtype_keep_it(tmp_path):
    model = tiny_model("bert").half()
    model.classifier.float()
    exact = model.classifier.weight.detach().clone()
    again = load(save(model, tmp_path / "small", metadata={}))
    assert again.bert.pooler.dense.weight.dtype == torch.float16
    assert torch.equal(again.classifier.weight, exact)


def test_a_class_that_the_folder_fills_nothing_of_is_refused(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    with pytest.raises(lc.CheckpointError, match="has no weights for any part of GPT2"):
        load(tmp_path / "bert", model_class=type(tiny_model("gpt2")))


@pytest.mark.parametrize("given", [None, 3])
def test_what_is_no_place_is_refused(model, given):
    for work in (load, lambda where: save(model, where, metadata={})):
        with pytest.raises(lc.ConfigError, match=f"folder must be .*, got {given}"):
            work(given)
    with pytest.raises(lc.ConfigError, match="model_class must be a class of transformers, got 'BertModel'"):
        load("folder", model_class="BertModel")


def test_a_plain_folder_with_cut_weights_is_told(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(lc.CheckpointError, match="cannot be loaded"):
        load(tmp_path)


@pytest.mark.parametrize(
    "step", [lc.DynamicQuantization(), lc.StructuredPruning(ffn=0.5, scope="global", uniform=False)]
)
def test_the_base_of_a_compressed_model_can_be_saved_alone(step, tmp_path):
    model = lc.compress(tiny_model("bert"), step, progress=False).model
    model.base_model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        found, expected = (one(**tiny_inputs(model)).last_hidden_state for one in (again, model.base_model))
    assert torch.equal(found, expected)


def test_a_tokenizer_that_cannot_be_read_is_told(tmp_path):
    tiny_model("bert").save_pretrained(tmp_path / "bert")
    tiny_tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text("{")
    with pytest.raises(lc.CheckpointError, match=r"the tokenizer in \S+ cannot be read: .*; pass tokenizer="):
        lc.compress(tmp_path / "bert", lc.MagnitudePruning(), progress=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architectures": None}, "names no class under architectures; pass model_class"),
        ({"hidden_size": "wide"}, r"config\.json cannot be read|is no folder of a model"),
    ],
)
def test_configs_that_cannot_be_read_are_told(tmp_path, change, words):
    tiny_model("bert").save_pretrained(tmp_path)
    edit("config.json", **change)(tmp_path)
    with pytest.raises(lc.CheckpointError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("weight_map", [5, {"a": 5}, {"a": "../elsewhere.safetensors"}])
def test_an_index_names_files_of_its_folder(tmp_path, weight_map):
    model = tiny_model("bert")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(lc.CheckpointError, match=r"index\.json (is damaged|must name files of its folder)"):
        lc.compress_checkpoint(tmp_path, tmp_path / "out", "magnitude_pruning", progress=False)


def test_modules_of_ones_own_are_told_when_they_are_read(tmp_path):
    model = tiny_model("bert")
    model.classifier = torch.nn.Sequential(torch.nn.Linear(64, 2))
    save(model, tmp_path / "own", metadata={})
    with pytest.raises(
        lc.CheckpointError, match=r"no weights for classifier\.bias, .*; it holds classifier\.0\.bias instead"
    ):
        load(tmp_path / "own")
