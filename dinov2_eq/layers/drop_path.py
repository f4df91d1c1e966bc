"""Stochastic depth (Huang et al., arXiv 1603.09382) that skips dropped samples, as in DINOv2 (section 5)."""

from collections.abc import Callable

import torch
from torch import Tensor

from dinov2_eq.layers.attention import CropShapes


def add_branch(
    x: Tensor, branch: Callable[[Tensor, CropShapes], Tensor], crop_shapes: CropShapes, drop_rate: float
) -> Tensor:
    """Adds branch(x) to x for a random part of the samples of each group, scaled up to keep the expectation.

    start = 0
    for b, tokens in crop_shapes:
        group = x[start : start + b * tokens].view(b, tokens, D)
        k = max(floor(b * (1 - drop_rate)), 1)        # a group of one sample is never dropped; an empty one stays empty
        for sample in randperm(b)[:k]:
            group[sample] += b / k * branch(group[sample])
        start += b * tokens

    Args:
        x: [T, D], the concatenated tokens of all groups.
        branch: called once, with the kept tokens [T_kept, D] and their shapes.
        crop_shapes: (batch, tokens) of each group.
        drop_rate: in [0, 1); with 0, no random number is drawn.
    """
    if drop_rate == 0:
        return x + branch(x, crop_shapes)
    rows, scales, kept_shapes, start = [], [], [], 0
    for batch, tokens in crop_shapes:
        num_kept = min(max(int(batch * (1 - drop_rate)), 1), batch)
        samples = torch.randperm(batch, device=x.device)[:num_kept]
        rows.append((start + samples[:, None] * tokens + torch.arange(tokens, device=x.device)).flatten())
        scales.append(torch.full((num_kept * tokens, 1), batch / max(num_kept, 1), device=x.device))
        kept_shapes.append((num_kept, tokens))
        start += batch * tokens
    kept_rows = torch.cat(rows)  # [T_kept]
    update = torch.cat(scales) * branch(x[kept_rows], kept_shapes)  # [T_kept, D]
    return x.index_add(0, kept_rows, update.to(x.dtype))
