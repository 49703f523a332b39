"""Teachers: named ones, several as one, those with a tokenizer of their own; what does not fit is refused."""

import copy
import json
import math
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers

import llmcompress as lc
from llmcompress.compressor import Context, Cut
from llmcompress.distillation.batches import collate, make_rows
from llmcompress.distillation.checks import common_classes
from llmcompress.distillation.losses.ordered import uld
from llmcompress.distillation.reading import OwnTokens
from llmcompress.distillation.teachers import averaged, fitting_cuts
from llmcompress.distillation.teaching import PlannedTeacher, history_of
from llmcompress.testing import tiny_data, tiny_model, tiny_tokenizer

FIELDS = {"steps": 3, "batch_size": 8, "max_length": 24, "precision": "fp32", "learning_rate": 1e-3}


def run(model, step, tokenizer=None, data=None):
    data = tiny_data(model, 16) if data is None else data
    return lc.compress(model, step, data=data, tokenizer=tokenizer or tiny_tokenizer(), progress=False)


def first_loss(result):
    told = next(action for action in result.report.steps[0].touched if action.does.startswith("train on"))
    return float(told.reason.removeprefix("loss ").split(" -> ")[0])


@pytest.fixture
def folder(tmp_path):
    teacher = tiny_model("bert", seed=1)
    teacher.save_pretrained(tmp_path / "teacher")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_teacher_from_a_folder_teaches_as_the_one_in_memory_and_needs_no_original(folder):
    model = tiny_model("bert")
    step = lc.KnowledgeDistillation(teacher=folder, alpha=1.0, **FIELDS)
    assert "teacher" not in step.needs
    named = run(model, step).model
    held = run(model, lc.KnowledgeDistillation(teacher=tiny_model("bert", seed=1), alpha=1.0, **FIELDS)).model
    own = run(model, lc.KnowledgeDistillation(alpha=1.0, **FIELDS)).model
    for name, tensor in named.state_dict().items():
        assert torch.equal(tensor, held.state_dict()[name])
    assert not torch.equal(named.classifier.weight, own.classifier.weight)
    again = lc.compress(
        copy.deepcopy(model), step, data=tiny_data(model, 16), tokenizer=tiny_tokenizer(), progress=False, inplace=True
    )
    assert torch.equal(again.model.classifier.weight, named.classifier.weight)


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.7, 0.2, 0.1]])
def test_several_teachers_are_the_mean_of_their_probabilities(shares):
    torch.manual_seed(0)
    logits = [torch.randn(2, 3, 5).double() * 3 for _ in shares]
    for kind in ("classification", "regression"):
        found = averaged(kind, logits, shares)
        for row in range(2):
            for place in range(3):
                one = [entry[row, place].tolist() for entry in logits]
                for index in range(5):
                    if kind == "regression":
                        expected = sum(share * values[index] for share, values in zip(shares, one, strict=True))
                        assert float(found[row, place, index]) == pytest.approx(expected, rel=1e-5)
                        continue
                    chances = [math.exp(values[index]) / sum(map(math.exp, values)) for values in one]
                    expected = sum(share * chance for share, chance in zip(shares, chances, strict=True))
                    assert math.exp(float(found[row, place, index])) == pytest.approx(expected, rel=1e-5)


def test_the_first_loss_of_an_ensemble_is_the_brute_force_one(folder):
    model = tiny_model("bert")
    texts = [example.text for example in tiny_data(model, 8)]
    fields = {**FIELDS, "steps": 1, "learning_rate": 1e-9, "temperature": 1.0, "alpha": 1.0}
    student = tiny_model("bert", seed=2)
    step = lc.KnowledgeDistillation(teacher={folder: 3, "original": 1}, student=student, **fields)
    no_dropout(student)
    loss = first_loss(run(model, step, data=texts))
    inputs = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        taught = 0.75 * tiny_model("bert", seed=1)(**inputs).logits.softmax(-1)
        taught = taught + 0.25 * model.eval()(**inputs).logits.softmax(-1)
        learnt = student.eval()(**inputs).logits.log_softmax(-1)
    assert loss == pytest.approx(float((taught * (taught.log() - learnt)).sum() / len(texts)), rel=1e-3)


def no_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


def test_teachers_in_memory_have_weights_as_named_ones_do():
    model, other = tiny_model("bert"), tiny_model("bert", seed=1)
    texts = [example.text for example in tiny_data(model, 8)]
    fields = {**FIELDS, "steps": 1, "learning_rate": 1e-9, "temperature": 1.0, "alpha": 1.0}
    no_dropout(model)
    step = lc.KnowledgeDistillation(teacher={other: 3, "original": 1}, **fields)
    loss = first_loss(run(model, step, data=texts))
    inputs = tiny_tokenizer()(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        own = model.eval()(**inputs).logits.softmax(-1)
        taught = 0.75 * other.eval()(**inputs).logits.softmax(-1) + 0.25 * own
    assert loss == pytest.approx(float((taught * (taught / own).log()).sum() / len(texts)), rel=1e-3)
    written = step.to_dict()
    assert written["teacher"]["weighted"][1] == {"source": "original", "weight": 1.0}
    with pytest.raises(lc.ConfigError, match="was a BertForSequenceClassification in memory"):
        lc.KnowledgeDistillation(teacher=written["teacher"])


def test_a_teacher_that_is_trained_in_place_is_refused():
    model = tiny_model("bert")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(lc.ConfigError, match="teacher must stay as it is"):
        lc.compress(
            model, lc.KnowledgeDistillation(teacher=model, alpha=1.0, **FIELDS), data=tiny_data(model, 16),
            tokenizer=tiny_tokenizer(), progress=False, inplace=True,
        )  # fmt: skip
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    run(model, lc.KnowledgeDistillation(teacher=model, alpha=1.0, **FIELDS))  # a copy is trained


# What earlier steps cut


def test_the_history_of_another_teacher_is_what_it_has_as_well():
    width = Cut("model", "hidden", tuple(range(32)), 64)
    blocks = [Cut("model.layers", "layers", (1,), 2), Cut("model.layers.0.self_attn", "heads", (1,), 2)]
    original, other = tiny_model("llama"), tiny_model("llama", seed=1)
    assert history_of(PlannedTeacher("original", 1.0, original), [width, *blocks]) == [width, *blocks]
    assert history_of(PlannedTeacher("other", 1.0, other), [width, *blocks]) == blocks
    deeper = [Cut("model.layers", "layers", (0, 3), 4), *blocks]
    assert fitting_cuts(other, deeper) == []
    wider = Cut("model.layers.0.self_attn", "heads", (1,), 4)
    assert fitting_cuts(other, [blocks[0], wider]) == []
    assert fitting_cuts(tiny_model("bert"), [blocks[0]]) == blocks[:1]  # another architecture has no such path


def test_after_a_depth_cut_a_shallower_teacher_is_compared_with_its_own_blocks():
    model = tiny_model("bert")
    history = [Cut("bert.encoder.layer", "layers", (0, 5), 6)]
    context = Context(tokenizer=tiny_tokenizer(), teacher=model, history=history)
    step = lc.KnowledgeDistillation(teacher=tiny_model("bert", seed=1), features={"attention": 1.0}, **FIELDS)
    assert "compare attention of blocks 0 with 0, 1 with 1" in [action.does for action in step.plan(model, context)]


def in_folder(folder, tokenizer, size, seed=3):
    teacher = tiny_model("bert", seed=seed)
    teacher.resize_token_embeddings(size, mean_resizing=False)
    teacher.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return teacher.eval()


def reversed_tokenizer():
    content = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    plain = sorted(token for token, number in vocab.items() if number >= 4)
    renumbered = dict(zip(plain, sorted((vocab[token] for token in plain), reverse=True), strict=True))
    content["model"]["vocab"] = vocab | renumbered
    content["added_tokens"] = [entry for entry in content["added_tokens"] if entry["id"] < 4]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)), pad_token="<pad>", unk_token="<unk>"
    )


@pytest.mark.parametrize(
    ("made", "size"),
    [(reversed_tokenizer, 128), (lambda: other_tokenizer(), 140), (tiny_tokenizer, 160), (tiny_tokenizer, 128)],
    ids=["other numbers", "more tokens", "padded", "same"],
)
def test_after_a_vocabulary_cut_another_teacher_reads_the_texts_by_its_own_numbers(made, size, tmp_path):
    model = tiny_model("bert")
    no_dropout(model)
    teacher = in_folder(tmp_path, made(), size)
    texts = ["the cat sat", "a dog ran by", "the dog"]
    fields = {**FIELDS, "steps": 1, "learning_rate": 1e-9, "temperature": 1.0, "alpha": 1.0}
    steps = [lc.VocabularyPruning(), lc.KnowledgeDistillation(teacher=str(tmp_path), **fields)]
    result = lc.compress(model, steps, data=texts, tokenizer=tiny_tokenizer(), progress=False)
    assert result.model.config.vocab_size < 128
    told = next(action for action in result.report.steps[1].touched if action.does.startswith("train on"))
    with torch.no_grad():
        taught = teacher(**made()(texts, padding=True, return_tensors="pt")).logits.log_softmax(-1)
        learnt = model.eval()(**tiny_tokenizer()(texts, padding=True, return_tensors="pt")).logits.log_softmax(-1)
    expected = float((taught.exp() * (taught - learnt)).sum() / len(texts))
    assert float(told.reason.removeprefix("loss ")) == pytest.approx(expected, rel=1e-3)


def test_tokens_under_numbers_that_no_cut_tells_are_refused():
    history = [Cut("embed", "vocabulary", (0, 2, 4), 6)]
    teacher = tiny_model("llama")
    for ids, left in (({0: 0, 1: 2, 2: 4}, history), ({0: 0, 1: 1, 2: 2}, []), (None, history)):
        assert history_of(PlannedTeacher("other", 1.0, teacher, ids=ids), history) == left
    with pytest.raises(lc.UnsupportedModelError, match="numbers that they had before"):
        history_of(PlannedTeacher("other", 1.0, teacher, ids={0: 0, 1: 3, 2: 5}), history)


def test_of_padded_vocabularies_the_highest_id_is_compared_too():
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = content["model"]["vocab"]
    # A hole: letters move up behind numbers that nobody has.
    content["model"]["vocab"] = {token: number if number < 60 else number + 20 for token, number in vocab.items()}
    content["added_tokens"] = []
    holes = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(json.dumps(content)))
    highest = max(holes.get_vocab().values())
    assert len(holes) < highest + 1
    small, large = tiny_model("llama"), tiny_model("llama")
    small.resize_token_embeddings(highest + 1, mean_resizing=False)
    large.resize_token_embeddings(highest + 9, mean_resizing=False)
    assert common_classes("causal_lm", small, large, holes, []) == highest + 1
    small.resize_token_embeddings(highest, mean_resizing=False)
    with pytest.raises(
        lc.UnsupportedModelError, match=f"ids up to {highest} of the tokenizer's .* tokens, got vocabularies"
    ):
        common_classes("causal_lm", small, large, holes, [])


# Another padding token


def classifier(seed, pad):
    torch.manual_seed(seed)
    sizes = {"vocab_size": 140, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=2, num_key_value_heads=2, num_labels=2, pad_token_id=pad, initializer_range=0.3
    )
    return transformers.LlamaForSequenceClassification(config).eval()


@pytest.mark.parametrize("own", [False, True], ids=["same tokenizer", "its own"])
def test_a_decoder_classifier_finds_the_end_of_each_text_by_its_own_padding_token(own, tmp_path):
    student, teacher = classifier(0, 0), classifier(1, 3)
    tokenizer = other_tokenizer() if own else tiny_tokenizer()
    if own:
        tokenizer.pad_token = None
        teacher.save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
    texts = ["ab", "a much longer text"]
    fields = {**FIELDS, "steps": 1, "learning_rate": 1e-9, "temperature": 1.0, "alpha": 1.0}
    step = lc.KnowledgeDistillation(teacher=str(tmp_path) if own else teacher, **fields)
    found = first_loss(run(student, step, data=texts))
    expected = 0.0
    with torch.no_grad():
        for text in texts:
            taught = teacher(torch.tensor([tokenizer(text)["input_ids"]])).logits.log_softmax(-1)
            learnt = student(torch.tensor([tiny_tokenizer()(text)["input_ids"]])).logits.log_softmax(-1)
            expected += float((taught.exp() * (taught - learnt)).sum()) / len(texts)
    assert found == pytest.approx(expected, rel=1e-3)


# Another tokenizer


def test_sorted_probabilities_are_compared_by_brute_force():
    torch.manual_seed(0)
    ours, theirs = torch.randn(2, 4, 5).double(), torch.randn(2, 4, 9).double()
    mask = torch.tensor([[True, True, False, True], [False, True, False, False]])
    total = 0.0
    for row, place in mask.nonzero().tolist():
        lists = []
        for logits in (ours, theirs):
            values = [value / 2.0 for value in logits[row, place].tolist()]
            whole = sum(map(math.exp, values))
            lists.append(sorted((math.exp(value) / whole for value in values), reverse=True) + [0.0] * 9)
        total += sum(abs(first - second) for first, second in zip(lists[0][:9], lists[1][:9], strict=True))
    for student, teacher in ((ours, theirs), (theirs, ours)):
        found = uld(student, teacher, temperature=2.0, mask=mask, count=7)
        assert float(found) == pytest.approx(2.0 * total / 7, rel=1e-5)


def faithful_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.decoder = tokenizers.decoders.Fuse()  # else it puts spaces between all tokens
    return tokenizer


def other_tokenizer():
    tokenizer = faithful_tokenizer()
    tokenizer.add_tokens(["cat", "dog", "the"])
    return tokenizer


def test_a_teacher_with_its_own_tokenizer_answers_token_by_token_of_the_continuation():
    student, teacher = faithful_tokenizer(), other_tokenizer()
    rows = make_rows(
        "causal_lm", tiny_model("llama"), student, [lc.Example("the cat", "sat by a dog")], max_length=64, labelled=True
    )
    batch = collate("causal_lm", rows, pad=0)
    reads = OwnTokens(student, teacher, 64, pad=0)
    inputs = reads(batch)
    prompt = len(teacher("the cat")["input_ids"])
    assert len(student("the cat")["input_ids"]) > prompt
    answer = teacher("sat by a dog", add_special_tokens=False)["input_ids"]
    assert inputs["input_ids"][0, prompt : prompt + len(answer)].tolist() == answer
    # Logits that tell their place: the answers lie beside the student's from the first token of the continuation on.
    places = torch.arange(inputs["input_ids"].shape[1] - 1.0)[None, :, None]
    laid = reads.lay(places, batch)
    begins = next(place for place, label in enumerate(rows[0]["labels"]) if label != -100)
    length = inputs["input_ids"].shape[1]
    assert laid.logits[0, begins - 1 : begins - 1 + len(answer), 0].tolist() == list(
        range(prompt - 1, prompt - 1 + len(answer))
    )
    assert int(laid.answered[0, begins - 1 :].sum()) == length - prompt


def sibling_in(folder, family):
    sibling = tiny_model(family, seed=3)
    sibling.resize_token_embeddings(140, mean_resizing=False)
    no_dropout(sibling)
    sibling.save_pretrained(folder)
    other_tokenizer().save_pretrained(folder)
    return sibling


def test_a_classifier_and_its_teacher_read_each_with_its_own_tokenizer(tmp_path):
    teacher = tiny_model("bert")
    sibling = sibling_in(tmp_path, "bert").eval()
    sibling.config.update({"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0})
    sibling.save_pretrained(tmp_path)
    texts = [example.text for example in tiny_data(teacher, 8)]
    fields = {**FIELDS, "steps": 1, "learning_rate": 1e-9, "temperature": 1.0, "alpha": 1.0}
    result = run(teacher, lc.KnowledgeDistillation(student=str(tmp_path), **fields), data=texts)
    assert len(result.tokenizer) == len(other_tokenizer())
    with torch.no_grad():
        inputs = [
            tokenizer(texts, padding=True, return_tensors="pt") for tokenizer in (tiny_tokenizer(), other_tokenizer())
        ]
        assert not torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
        taught = teacher.eval()(**inputs[0]).logits.log_softmax(-1)
        learnt = sibling(**inputs[1]).logits.log_softmax(-1)
    assert first_loss(result) == pytest.approx(float((taught.exp() * (taught - learnt)).sum() / len(texts)), rel=1e-3)


def test_a_language_model_learns_from_one_with_another_tokenizer_on_request(tmp_path):
    teacher = tiny_model("llama")
    sibling_in(tmp_path, "llama")
    fields = {"student": str(tmp_path), **FIELDS, "steps": 40, "learning_rate": 3e-3, "alpha": 1.0}
    result = run(teacher, lc.KnowledgeDistillation(soft="uld", **fields), faithful_tokenizer())
    told = next(action for action in result.report.steps[0].touched if action.does.startswith("train on"))
    losses = [float(loss) for loss in told.reason.removeprefix("loss ").split(" -> ")]
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(lc.UnsupportedModelError, match="soft='uld'"):
        run(teacher, lc.KnowledgeDistillation(**fields), faithful_tokenizer())
    unfaithful = str(tmp_path / "unfaithful")
    sibling_in(unfaithful, "llama")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["cat"])
    tokenizer.save_pretrained(unfaithful)
    with pytest.raises(lc.UnsupportedModelError, match="must decode what it encodes"):
        run(teacher, lc.KnowledgeDistillation(soft="uld", **{**fields, "student": unfaithful}))


# Refusals


@pytest.mark.parametrize(
    "value", [[], {}, {"a": 0}, {"a": math.nan}, ["a", "a"], ["a", "a/"], {Path("a"): 1, "./a": 2}, 3, ""]
)
def test_malformed_teachers_are_refused(value):
    with pytest.raises(lc.ConfigError, match=r"KnowledgeDistillation.teacher must"):
        lc.KnowledgeDistillation(teacher=value)


def test_teachers_that_do_not_fit_are_refused_in_the_plan(folder, tmp_path):
    def refused(error, match, model=None, **fields):
        model = tiny_model("bert") if model is None else model
        context = Context(tokenizer=tiny_tokenizer(), teacher=copy.deepcopy(model))
        with pytest.raises(error, match=match):
            lc.KnowledgeDistillation(**fields).plan(model, context)

    config = tiny_model("bert").config.to_dict() | {"id2label": {0: "a", 1: "b", 2: "c"}}
    three = transformers.BertForSequenceClassification(transformers.BertConfig.from_dict(config))
    refused(lc.ConfigError, "teacher must be a folder with a model", teacher=str(tmp_path / "missing"))
    missing = {"teacher": str(tmp_path / "missing")}
    refused(lc.ConfigError, "teacher must be left out where no teacher is asked", alpha=0.0, **missing)
    cache = lc.TeacherCache(folder=tmp_path)
    refused(lc.ConfigError, "cache must be left out where no teacher is asked", alpha=0.0, cache=cache)
    refused(lc.ConfigError, "generation must have one teacher", teacher=[folder, "original"], generation={})
    turned = {"id2label": {0: "good", 1: "bad"}, "label2id": {"good": 0, "bad": 1}}
    straight = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    teacher, student = (
        transformers.BertForSequenceClassification(
            transformers.BertConfig.from_dict(tiny_model("bert").config.to_dict() | names)
        )
        for names in (turned, straight)
    )
    refused(lc.UnsupportedModelError, r"same order, got \['good', 'bad'\]", teacher=teacher, model=student)
    refused(lc.UnsupportedModelError, "same classes, got 3 and 2 labels", teacher=three)
    refused(lc.UnsupportedModelError, "same kind of head", teacher=folder, model=tiny_model("llama"))
    refused(lc.ConfigError, "one teacher", teacher=[folder, "original"], features={"hidden": 1.0})
    transformers.BertModel(transformers.BertConfig.from_dict(config)).save_pretrained(tmp_path / "body")
    refused(lc.UnsupportedModelError, "got BertModel", teacher=str(tmp_path / "body"))


def test_a_teacher_that_writes_has_to_read_as_the_student_which_the_plan_tells(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    other_tokenizer().save_pretrained(tmp_path)
    step = lc.KnowledgeDistillation(
        steps=1, max_length=8, teacher=str(tmp_path), soft="uld", alpha=0.5, generation={"way": "sequence"}
    )
    with pytest.raises(lc.ConfigError, match=r"one teacher with the student's tokenizer to write, got .* with another"):
        lc.plan(tiny_model("llama"), step, data=["a cat sat on a mat"] * 2, tokenizer=faithful_tokenizer())
