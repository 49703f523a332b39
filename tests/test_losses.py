"""Distillation losses against brute force in float64: masks, temperature, normalisation, and who gets a gradient."""

import math
from types import SimpleNamespace

import pytest
import torch

import llmcompress as lc
from llmcompress.distillation.answers import Answers
from llmcompress.distillation.loss_choice import SoftLoss
from llmcompress.distillation.losses.divergences import forward_kl, jsd, reverse_kl, skew_kl, skew_reverse_kl
from llmcompress.distillation.losses.labels import cross_entropy, squared_error
from llmcompress.distillation.losses.maps import attention_kl, attention_mse, relation_kl
from llmcompress.distillation.losses.states import cosine_distance, mean_squared_error, relative_error
from llmcompress.distillation.losses.table import FEATURE_LOSSES, SOFT_LOSSES
from llmcompress.distillation.objective import Objective
from llmcompress.distillation.observation import Observed
from llmcompress.distillation.schedule import value_at


def softmax(logits):
    powers = [math.exp(x) for x in logits]
    return [x / sum(powers) for x in powers]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def mix(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


# Of the teacher's p and the student's q, as the papers write them.
BY_HAND = {
    "forward_kl": lambda p, q: kl(p, q),
    "reverse_kl": lambda p, q: kl(q, p),
    "jsd": lambda p, q: 0.1 * kl(p, mix(p, q, 0.1)) + 0.9 * kl(q, mix(p, q, 0.1)),
    "skew_kl": lambda p, q: kl(p, mix(p, q, 0.3)),
    "skew_reverse_kl": lambda p, q: kl(q, mix(p, q, 0.7)),
    "tvd": lambda p, q: sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
}
SETTINGS = {"jsd": {"beta": 0.1}, "skew_kl": {"skew": 0.3}, "skew_reverse_kl": {"skew": 0.3}}
MASK = torch.tensor([[True, True, False], [True, False, False]])


def counted(mask=MASK):
    return [tuple(place) for place in mask.nonzero().tolist()]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("name", BY_HAND)
def test_soft_losses_are_sums_over_counted_positions_and_classes_at_the_temperature(name, temperature):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 3, 5), 2 * torch.randn(2, 3, 5)
    expected = 0.0
    for place in counted():
        p, q = (softmax([x / temperature for x in logits[place].tolist()]) for logits in (teacher, student))
        expected += BY_HAND[name](p, q) * (temperature if name == "tvd" else temperature**2)
    loss = SoftLoss(name=name, **SETTINGS.get(name, {}))
    assert float(loss(student, teacher, temperature=temperature, mask=MASK)) == pytest.approx(expected / 3, rel=1e-4)
    # The count of a larger batch, of which this is a part.
    part = loss(student, teacher, temperature=temperature, mask=MASK, count=torch.tensor(12))
    assert float(part) == pytest.approx(expected / 12, rel=1e-4)


def test_positions_without_an_answer_of_the_teacher_are_not_divided_by():
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 4, 5), torch.randn(1, 4, 5)
    answered = torch.tensor([[False, True, True, False]])
    tokens = torch.ones(1, 5, dtype=torch.long)
    batch = {"input_ids": tokens, "attention_mask": tokens, "labels": torch.tensor([[-100, 1, 1, 1, 1]])}
    objective = Objective("causal_lm", soft=SoftLoss(name="uld"))
    ours = Observed(SimpleNamespace(logits=torch.cat([student, student[:, :1]], 1)))
    counts = objective.counts(batch)
    for answers, expected in (
        (answered, SOFT_LOSSES["uld"](student, teacher, mask=answered)),
        (~answered & answered, 0),
    ):
        theirs = Observed(None, answers=Answers(teacher, answered=answers))
        assert float(objective(ours, theirs, batch, counts)) == pytest.approx(float(expected), rel=1e-5)
        # Of two batches like this one, each has half.
        assert float(objective(ours, theirs, batch, 2 * counts)) == pytest.approx(float(expected) / 2, rel=1e-5)


def test_every_soft_loss_is_checked_here_and_mse_is_a_squared_distance():
    assert set(SOFT_LOSSES) == {*BY_HAND, "mse", "uld"}  # uld in test_teachers.py
    student, teacher = torch.tensor([[1.0, 2.0], [9.0, 9.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    assert float(SOFT_LOSSES["mse"](student, teacher, mask=torch.tensor([True, False]))) == 5.0


def test_the_ends_of_jsd_and_skew_are_the_forward_and_the_reverse_kl():
    torch.manual_seed(0)
    student, teacher = torch.randn(4, 7).double(), torch.randn(4, 7).double()
    forward, reverse = float(forward_kl(student, teacher)), float(reverse_kl(student, teacher))
    assert abs(forward - reverse) > 0.05
    assert float(jsd(student, teacher, beta=0.0)) == forward
    assert float(jsd(student, teacher, beta=1.0)) == reverse
    # Near the ends too: a beta that is read the other way round would swap these.
    assert float(jsd(student, teacher, beta=1e-3)) / 1e-3 == pytest.approx(forward, rel=0.02)
    assert float(jsd(student, teacher, beta=1 - 1e-3)) / 1e-3 == pytest.approx(reverse, rel=0.02)
    assert float(jsd(student, teacher, beta=0.3)) == pytest.approx(float(jsd(teacher, student, beta=0.7)), rel=1e-6)
    assert float(skew_kl(student, teacher, skew=0.0)) == forward
    assert float(skew_reverse_kl(student, teacher, skew=0.0)) == reverse


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_the_temperature_reaches_the_gradient_and_keeps_its_size(name):
    torch.manual_seed(0)
    start, teacher = torch.randn(4, 7), torch.randn(4, 7)
    gradients = []
    for temperature, scale in ((1.0, 1.0), (4.0, 1.0), (1.0, 0.01), (4.0, 0.01)):
        student = (scale * start).requires_grad_()
        SOFT_LOSSES[name](student, scale * teacher, temperature=temperature).backward()
        gradients.append(student.grad)
    if name == "mse":  # there it drops out, and is said to
        assert torch.allclose(gradients[0], gradients[1])
    else:
        assert float((gradients[0] - gradients[1]).norm()) > 0.05 * float(gradients[0].norm())
    # Where distributions are almost even, the temperature's power takes back what it divides by.
    assert float(gradients[2].norm()) == pytest.approx(float(gradients[3].norm()), rel=0.05)


@pytest.mark.parametrize("name", SOFT_LOSSES)
def test_soft_losses_are_zero_at_the_teacher_and_classes_without_a_chance_change_nothing(name):
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    loss = SOFT_LOSSES[name]
    assert float(loss(teacher, teacher)) == pytest.approx(0.0, abs=1e-6)
    wide = [torch.cat([logits, torch.full((3, 95), -1e4)], -1) for logits in (student, teacher)]
    # So nothing is divided by the size of the vocabulary.
    assert float(loss(*wide)) == pytest.approx(float(loss(student, teacher)), rel=1e-5)
    nothing = loss(student, teacher, mask=torch.zeros(3, dtype=torch.bool))
    assert float(nothing) == 0.0


def feature_inputs(reads):
    shape = {"attention": (2, 4, 3, 3), "relations": (2, 3, 8)}.get(reads, (2, 3, 8))
    made = [torch.randn(shape), torch.randn(shape)]
    return [one.softmax(-1) for one in made] if reads == "attention" else made


@pytest.mark.parametrize("name", [*SOFT_LOSSES, *FEATURE_LOSSES])
def test_only_the_student_gets_a_gradient_and_only_where_it_counts(name):
    torch.manual_seed(0)
    feature = FEATURE_LOSSES.get(name)
    student, teacher = (one.requires_grad_() for one in feature_inputs(feature.reads if feature else None))
    function = feature.function if feature else SOFT_LOSSES[name]
    function(student, teacher, mask=MASK, **({"heads": 2} if name == "relations" else {})).backward()
    assert teacher.grad is None
    gradient = student.grad.transpose(1, 2) if feature and feature.reads == "attention" else student.grad
    assert bool((gradient[~MASK] == 0).all())
    # A token alone in its row is related to itself only, whatever it is.
    assert all(float(gradient[place].norm()) > 0 for place in counted() if place[0] == 0 or name != "relations")


def test_hard_and_squared_losses_against_brute_force():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [0, -100, -100]])
    expected = -sum(math.log(softmax(logits[place].tolist())[labels[place]]) for place in counted(labels != -100)) / 3
    assert float(cross_entropy(logits, labels, mask=labels != -100)) == pytest.approx(expected, rel=1e-5)
    scores, targets = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 4.0, 0.0])
    assert float(squared_error(scores, targets, mask=torch.tensor([True, True, False]))) == pytest.approx(2.5)


def test_losses_of_hidden_states_are_means_over_the_tokens_that_count():
    teacher = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [1.0, 1.0]]])
    student = torch.tensor([[[3.0, 3.0], [40.0, -30.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True, False]])
    # (0 + 1) / 25 and (100 + 4900) / 2500: the scale of a token drops out.
    assert float(relative_error(student, teacher, mask=mask)) == pytest.approx((1 / 25 + 2) / 2)
    assert float(mean_squared_error(student, teacher, mask=mask)) == pytest.approx((0.5 + 2500) / 2)
    # The second token's states are orthogonal.
    first = 1 - 21 / (5 * math.sqrt(18))
    assert float(cosine_distance(student, teacher, mask=mask)) == pytest.approx((first + 1) / 2)


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_losses_are_divided_by_the_count_that_is_given(name):
    torch.manual_seed(0)
    feature = FEATURE_LOSSES[name]
    inputs, heads = feature_inputs(feature.reads), {"heads": 2} if name == "relations" else {}
    whole = float(feature.function(*inputs, mask=MASK, **heads))
    assert float(feature.function(*inputs, mask=MASK, count=torch.tensor(12), **heads)) == pytest.approx(whole / 4)


def test_attention_losses_against_brute_force():
    torch.manual_seed(0)
    keys = MASK[:, None, None, :]
    student, teacher = (
        torch.randn(2, 4, 3, 3).masked_fill(~keys, torch.finfo(torch.float32).min).softmax(-1) for _ in range(2)
    )
    divergence = distance = 0.0
    for row, query in counted():
        for head in range(4):
            p, q = ([x for x in one[row, head, query].tolist() if x > 0] for one in (teacher, student))
            divergence += kl(p, q) / 4
            distance += sum((a - b) ** 2 for a, b in zip(p, q, strict=True)) / 4
    assert float(attention_kl(student, teacher, mask=MASK)) == pytest.approx(divergence / 3, rel=1e-5)
    assert float(attention_mse(student, teacher, mask=MASK)) == pytest.approx(distance / 3, rel=1e-5)


def test_relations_against_brute_force_across_widths():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 10)
    total = 0.0
    for row, token in counted():
        for head in range(2):
            sides = []
            for vectors in (teacher, student):
                width = vectors.shape[-1] // 2
                own = vectors[row, :, head * width : (head + 1) * width].tolist()
                others = [other for at, other in enumerate(own) if MASK[row, at]]
                dots = [sum(a * b for a, b in zip(own[token], other, strict=True)) for other in others]
                sides.append(softmax([dot / math.sqrt(width) for dot in dots]))
            total += kl(*sides) / 2
    assert float(relation_kl(student, teacher, heads=2, mask=MASK)) == pytest.approx(total / 3, rel=1e-5)


def test_schedules_go_from_start_to_end():
    assert [value_at((4.0, 1.0), done) for done in (0.0, 1 / 3, 1.0)] == pytest.approx([4.0, 3.0, 1.0])
    assert value_at(2.0, 0.7) == 2.0


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"soft": "forward_k"}, r"SoftLoss.name must be one of forward_kl.*did you mean 'forward_kl'"),
        ({"soft": {"name": "jsd", "beta": 1.5}}, r"SoftLoss.beta must be in \[0, 1\], got 1.5"),
        ({"soft": {"name": "tvd", "beta": 0.5}}, r"SoftLoss.beta must be left out for 'tvd'"),
        ({"soft": {"name": "jsd", "gamma": 0.5}}, r"SoftLoss has no field 'gamma'"),
        ({"features": {"hiden": 1.0}}, r"features must name .*got 'hiden'; did you mean 'hidden'"),
        ({"features": {"hidden": -1.0}}, r"features\['hidden'\] must be in \[0, inf\)"),
        ({"features": ["hidden"]}, r"features must be weights by name"),
        ({"layers": "first"}, r"KnowledgeDistillation.layers must be 'auto'"),
        ({"layers": (1, (2, 3))}, r"KnowledgeDistillation.layers must be 'auto'"),
        ({"layers": ((1, 2), (1, 3))}, r"name each student block once"),
        ({"layers": (-1,)}, r"KnowledgeDistillation.layers must be 'auto'"),
        ({"hidden": 1.0}, r"has no field 'hidden'"),
    ],
)
def test_losses_that_are_not_there_are_refused_on_construction(fields, match):
    with pytest.raises(lc.ConfigError, match=match):
        lc.KnowledgeDistillation(**fields)
