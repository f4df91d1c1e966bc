import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dinov2_eq.objectives.dino import dino_loss
from dinov2_eq.objectives.targets import centered_softmax, sinkhorn_knopp
from tests.processes import run_ranks


def slow_dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float) -> Tensor:
    terms = []
    for g in range(len(teacher_probs)):
        for v in range(len(student_logits)):
            if v != g:
                for target, logits in zip(teacher_probs[g], student_logits[v], strict=True):
                    terms.append(-sum(target * torch.log(torch.softmax(logits / student_temp, 0))))
    return sum(terms) / len(terms)


@pytest.mark.parametrize(("num_student", "num_teacher"), [(2, 2), (5, 2), (3, 1), (1, 2)])
@pytest.mark.parametrize("batch", [1, 3])
def test_dino_loss_against_loop(num_student, num_teacher, batch):
    torch.manual_seed(0)
    student = torch.randn(num_student, batch, 7, requires_grad=True)
    teacher = torch.randn(num_teacher, batch, 7).softmax(-1)
    expected = slow_dino_loss(student, teacher, 0.2)
    actual = dino_loss(student, teacher, student_temp=0.2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, student)[0] for value in (actual, expected)))


def test_dino_loss_is_dinov2s():
    """Local and global terms of DINOv2: means over the batch, all divided by 2 + 2 L pairs."""
    student, teacher = torch.randn(2 + 3, 4, 7), torch.randn(2, 4, 7).softmax(-1)
    log_probs = (student / 0.1).log_softmax(-1)

    def cross_entropy(g: int, v: int) -> Tensor:
        return -(teacher[g] * log_probs[v]).sum(-1).mean()

    local = sum(cross_entropy(g, 2 + j) for j in range(3) for g in range(2)) / 8
    both_global = (cross_entropy(0, 1) + cross_entropy(1, 0)) / 8
    torch.testing.assert_close(dino_loss(student, teacher), local + both_global)


def test_dino_loss_is_fp32():
    student, teacher = torch.randn(4, 3, 50).bfloat16(), torch.randn(2, 3, 50).softmax(-1).bfloat16()
    expected = dino_loss(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = dino_loss(student, teacher)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_dino_loss_needs_two_crops():
    with pytest.raises(ValueError, match="1 crop was given on both sides"):
        dino_loss(torch.randn(1, 3, 5), torch.rand(1, 3, 5))


def test_centered_softmax():
    logits, center = torch.randn(2, 3, 5, requires_grad=True), torch.randn(5)
    expected = torch.exp((logits - center) / 0.5)
    expected = expected / expected.sum(-1, keepdim=True)
    actual = centered_softmax(logits, center, temp=0.5)
    torch.testing.assert_close(actual, expected.detach())
    assert not actual.requires_grad
    assert centered_softmax(logits.bfloat16(), center, temp=0.5).dtype == torch.float32
    assert centered_softmax(torch.full((1, 4), 1e4), torch.zeros(4), temp=0.04).isfinite().all()


def slow_sinkhorn(logits: Tensor, temp: float, num_iterations: int) -> Tensor:
    q = torch.exp(logits.double() / temp)
    for _ in range(num_iterations):
        for p in range(q.shape[1]):
            q[:, p] /= q[:, p].sum()
        for i in range(q.shape[0]):
            q[i] /= q[i].sum()
    return q.float()


@pytest.mark.parametrize("num_iterations", [1, 3, 5])
@pytest.mark.parametrize("shape", [(6, 4), (3, 10), (1, 5)])
def test_sinkhorn_against_loop(shape, num_iterations):
    torch.manual_seed(0)
    logits = torch.randn(shape)
    expected = slow_sinkhorn(logits, 0.1, num_iterations)
    torch.testing.assert_close(sinkhorn_knopp(logits, 0.1, num_iterations), expected, atol=1e-5, rtol=1e-4)


def test_sinkhorn_properties():
    torch.manual_seed(0)
    logits = torch.randn(40, 8)
    targets = sinkhorn_knopp(logits, 0.5, num_iterations=50)
    torch.testing.assert_close(targets.sum(1), torch.ones(40))
    torch.testing.assert_close(targets.sum(0), torch.full((8,), 5.0), atol=1e-3, rtol=0)
    shifted = sinkhorn_knopp(logits + 3.0, 0.5, num_iterations=50)
    torch.testing.assert_close(shifted, targets, atol=1e-4, rtol=0)
    assert not sinkhorn_knopp(logits.requires_grad_(), 0.5).requires_grad


@pytest.mark.parametrize("scale", [1.0, 30.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sinkhorn_never_overflows(scale, dtype):
    torch.manual_seed(0)
    logits = scale * torch.randn(16, 64)
    logits[3] -= 100 * scale  # a sample far below the others
    logits[4] = logits[5]
    targets = sinkhorn_knopp(logits.to(dtype), temp=0.04)
    assert targets.dtype == torch.float32 and targets.isfinite().all()
    torch.testing.assert_close(targets.sum(1), torch.ones(16), atol=1e-5, rtol=0)


def test_sinkhorn_of_few_samples():
    assert sinkhorn_knopp(torch.zeros(0, 5), 0.04).shape == (0, 5)
    torch.testing.assert_close(sinkhorn_knopp(torch.randn(1, 5), 0.04), torch.full((1, 5), 0.2))
    torch.testing.assert_close(sinkhorn_knopp(torch.zeros(3, 5), 0.04), torch.full((3, 5), 0.2))


def logits_of_two_processes() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4), torch.randn(5, 4) * torch.tensor([[30.0], [1], [1], [1], [1]]), torch.randn(2, 4)]


def sinkhorn_of_own_part() -> list[np.ndarray]:
    """Case k: the first k samples on process 0, the others on process 1; process 0 may have none."""
    dist.init_process_group("gloo")
    own = [x[k:] if dist.get_rank() else x[:k] for k, x in enumerate(logits_of_two_processes())]
    targets = [sinkhorn_knopp(logits, 0.1).numpy() for logits in own]
    dist.destroy_process_group()
    return targets


def test_sinkhorn_over_two_processes():
    parts = run_ranks(sinkhorn_of_own_part, 2)
    for logits, first, second in zip(logits_of_two_processes(), *parts, strict=True):
        together = torch.from_numpy(np.concatenate([first, second]))
        torch.testing.assert_close(together, sinkhorn_knopp(logits, 0.1), atol=1e-6, rtol=1e-4)
