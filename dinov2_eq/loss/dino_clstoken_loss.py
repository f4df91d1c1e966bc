"""The DINO loss between class tokens (Caron et al., arXiv 2104.14294) and the teacher targets it compares with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum, get_rank, get_world_size

SMALLEST_MASS = 1e-30  # of a prototype nobody is near: small, and P times its inverse is still a float


@torch.no_grad()
def centered_softmax(logits: Tensor, center: Tensor, temp: float) -> Tensor:
    """Teacher targets by centring: softmax((logits - center) / temp) in fp32; logits [..., P], center [P]."""
    return F.softmax((logits.float() - center.float()) / temp, dim=-1)


def _max_over_processes(values: Tensor) -> Tensor:
    """The largest value, a scalar; -inf where no process has any."""
    largest = values.new_zeros(get_world_size())
    largest[get_rank()] = torch.cat([values.flatten(), values.new_tensor([-torch.inf])]).max()
    return all_reduce_sum(largest).max()


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, temp: float, num_iterations: int = 3) -> Tensor:
    """Teacher targets that share the prototypes evenly over the samples of all processes (SwAV, arXiv 2006.09882).

    Q = exp(logits / temp)                     # [n, P], rows of all processes
    for _ in range(num_iterations):
        for p in range(P):
            Q[:, p] /= Q[:, p].sum()           # every prototype gets the same mass
        for i in range(n):
            Q[i] /= Q[i].sum()                 # every sample is a distribution
    return Q

    Computed in fp32 and never overflows: each sample's largest entry is 1, and the factor this takes out, which matters
    only to the first round, is kept apart. A process may have no sample at all, n = 0; the others must call it too.

    Args:
        logits: [n, P].
        temp: teacher temperature, above 0.
    """
    scores = logits.float() / temp
    largest = scores.amax(dim=1, keepdim=True)  # [n, 1]
    targets = torch.exp(scores - largest)  # [n, P]
    sample_mass = torch.exp(largest - _max_over_processes(largest))  # [n, 1]
    for _ in range(num_iterations):
        prototype_mass = all_reduce_sum((sample_mass * targets).sum(dim=0))  # [P]
        targets /= prototype_mass.clamp(min=SMALLEST_MASS)
        targets /= targets.sum(dim=1, keepdim=True)
        sample_mass = torch.ones_like(sample_mass)
    return targets


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Cross-entropy between each global crop of the teacher and each other crop of the student.

    terms = []
    for g in range(G):
        for v in range(V):
            if v != g:                                            # v < G is the same crop on both sides
                log_probs = log_softmax(student_logits[v] / student_temp)
                terms.append(-(teacher_probs[g] * log_probs).sum(-1).mean())
    return mean(terms)

    Args:
        student_logits: [V, B, P], the G global crops first.
        teacher_probs: [G, B, P], each row sums to 1.

    Raises:
        ValueError: a single crop on both sides, so that there is no pair.
    """
    num_student, num_teacher, batch = len(student_logits), len(teacher_probs), student_logits.shape[1]
    num_pairs = num_student * num_teacher - min(num_student, num_teacher)
    if not num_pairs:
        raise ValueError("dino_loss compares different crops of an image, and 1 crop was given on both sides; give 2")
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)  # [V, B, P]
    with torch.autocast(student_logits.device.type, enabled=False):
        products = torch.einsum("gbp,vbp->gv", teacher_probs.float(), log_probs)  # [G, V]
    same_crop = torch.eye(num_teacher, num_student, dtype=torch.bool, device=products.device)
    return -products.masked_fill(same_crop, 0.0).sum() / (num_pairs * batch)
