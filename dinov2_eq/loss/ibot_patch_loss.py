"""The iBOT loss on masked patch tokens (Zhou et al., arXiv 2111.07832)."""

import torch.nn.functional as F
from torch import Tensor


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, num_crops: int, student_temp: float = 0.1
) -> Tensor:
    """Cross-entropy on each masked patch, averaged within its crop, then over all crops, masked or not.

    loss = 0
    for i in range(M):
        log_probs = log_softmax(student_logits[i] / student_temp)
        loss -= weights[i] * (teacher_probs[i] * log_probs).sum()
    return loss / num_crops

    Args:
        student_logits: [M, P] of the masked patches; M = 0 gives 0, and the gradient is 0.
        teacher_probs: [M, P] of the same patches, seen unmasked.
        weights: [M], 1 / (number of masked patches in the same crop).
        num_crops: number of global crops, those without a mask included.
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    cross_entropy = -(teacher_probs.float() * log_probs).sum(dim=-1)  # [M]
    return (weights.float() * cross_entropy).sum() / num_crops
