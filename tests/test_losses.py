"""Distillation losses against brute force: masks, temperature, normalisation, and who gets a gradient."""

import math

import pytest
import torch

from llmcompress.distillation.losses import cross_entropy, forward_kl, hidden_state_error, squared_error


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_forward_kl_is_the_sum_over_counted_positions_times_t_squared(temperature):
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected, positions = 0.0, 0
    for row in range(2):
        for at in range(3):
            if not mask[row, at]:
                continue
            positions += 1
            p = [math.exp(float(x) / temperature) for x in teacher[row, at]]
            q = [math.exp(float(x) / temperature) for x in student[row, at]]
            p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
            expected += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected *= temperature**2 / positions
    assert float(forward_kl(student, teacher, temperature=temperature, mask=mask)) == pytest.approx(expected, rel=1e-5)


def test_the_temperatures_square_keeps_the_gradients_size():
    torch.manual_seed(0)
    teacher = 0.01 * torch.randn(4, 7)
    sizes = []
    for temperature in (1.0, 8.0):
        student = torch.zeros(4, 7, requires_grad=True)
        forward_kl(student, teacher, temperature=temperature).backward()
        sizes.append(float(student.grad.norm()))
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    (forward_kl(student, teacher) + hidden_state_error(student, teacher)).backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_hard_and_squared_losses_against_brute_force():
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 5), torch.tensor([[1, 4, -100], [0, -100, -100]])
    mask = labels != -100
    probabilities = logits.softmax(-1)
    expected = -sum(math.log(float(probabilities[r, c, labels[r, c]])) for r, c in [(0, 0), (0, 1), (1, 0)]) / 3
    assert float(cross_entropy(logits, labels, mask=mask)) == pytest.approx(expected, rel=1e-5)
    scores, targets = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([0.0, 4.0, 0.0])
    assert float(squared_error(scores, targets, mask=torch.tensor([True, True, False]))) == pytest.approx(2.5)


def test_hidden_state_error_is_relative_to_each_tokens_size():
    teacher = torch.tensor([[[3.0, 4.0], [30.0, 40.0], [1.0, 1.0]]])
    student = torch.tensor([[[3.0, 3.0], [30.0, 30.0], [7.0, 7.0]]])
    mask = torch.tensor([[True, True, False]])
    # (0 + 1) / 25 for the first token, (0 + 100) / 2500 for the second: the scale drops out.
    assert float(hidden_state_error(student, teacher, mask=mask)) == pytest.approx(1 / 25)
