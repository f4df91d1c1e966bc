import pytest
import torch

from dinov2_eq.objectives.ibot import ibot_loss
from dinov2_eq.objectives.targets import sinkhorn_knopp


def test_against_loop_over_crops():
    torch.manual_seed(0)
    masked_per_crop = [3, 0, 1, 2]
    weights = torch.cat([torch.full((count,), 1 / max(count, 1)) for count in masked_per_crop])
    student, teacher = torch.randn(6, 7, requires_grad=True), torch.randn(6, 7).softmax(-1)
    expected, start = 0.0, 0
    for count in masked_per_crop:
        rows = range(start, start + count)
        terms = [-sum(teacher[i] * torch.log(torch.softmax(student[i] / 0.3, 0))) for i in rows]
        expected = expected + (sum(terms) / count if count else 0.0)
        start += count
    expected = expected / len(masked_per_crop)
    actual = ibot_loss(student, teacher, weights, num_crops=4, student_temp=0.3)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (actual, expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_masked(dtype):
    head = torch.nn.Linear(4, 7).to(dtype)
    logits = head(torch.randn(0, 4, dtype=dtype))
    teacher = sinkhorn_knopp(logits.detach(), 0.07)
    loss = ibot_loss(logits, teacher, torch.zeros(0), num_crops=4)
    loss.backward()
    assert loss == 0 and head.weight.grad.count_nonzero() == 0


def test_fp32():
    student, teacher = torch.randn(6, 50).bfloat16(), torch.randn(6, 50).softmax(-1).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = ibot_loss(student, teacher, torch.ones(6), num_crops=2)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, ibot_loss(student.float(), teacher.float(), torch.ones(6), num_crops=2))
