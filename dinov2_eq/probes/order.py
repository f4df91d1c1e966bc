"""Measures whether the features of an image move farther when it is changed more."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def feature_distances(base: Tensor, changed: Tensor) -> Tensor:
    """Returns 1 - cosine as half the squared distance of unit vectors, which keeps small ones exact.

    Args:
        base: [N, D], features of images.
        changed: [S, N, D], of the same images changed at S strengths.

    Returns:
        [S, N] in [0, 2].
    """
    return (F.normalize(changed, dim=-1) - F.normalize(base, dim=-1)).square().sum(dim=-1) / 2


def pairs_of(distances: Tensor) -> tuple[Tensor, Tensor]:
    """Returns all pairs of places a < b in the first axis, as two index tensors [P]."""
    number = len(distances)
    first, second = torch.triu_indices(number, number, offset=1, device=distances.device)
    return first, second


def order_accuracy(distances: Tensor) -> Tensor:
    """Share of the triplets (image, weaker change, stronger change) whose distances are in order; chance is 0.5.

    Args:
        distances: [S, N] of the features of N images to those of the images changed at S strengths, weakest first.

    Returns:
        [N] float64; equal distances count one half.
    """
    first, second = pairs_of(distances)
    return (distances[second] - distances[first]).sign().double().add(1).div(2).mean(dim=0)


def spearman(distances: Tensor) -> Tensor:
    """Spearman's correlation between strength and distance of each image; equal distances share their mean rank.

    Args:
        distances: [S, N], S > 1, weakest first; no two strengths are equal.

    Returns:
        [N] float64 in [-1, 1]; 0 if all distances of an image are equal.
    """
    from scipy.stats import rankdata  # takes seconds, and training reads this file without it

    ranks = torch.from_numpy(np.asarray(rankdata(distances.cpu().numpy(), axis=0), dtype=np.float64))
    ranks = ranks - ranks.mean(dim=0)
    steps = torch.arange(len(ranks), dtype=torch.float64)
    steps = (steps - steps.mean())[:, None]
    norms = (ranks.square().sum(dim=0) * steps.square().sum()).sqrt()
    return torch.where(norms > 0, (ranks * steps).sum(dim=0) / norms.clamp(min=1e-300), 0.0)


def spearman_across(distances: Tensor) -> float:
    """Spearman's correlation between strength and distance of all images together; 0 if all distances are equal.

    Unlike `spearman` it asks that a distance means the same strength in every image.
    """
    from scipy.stats import spearmanr

    values = distances.cpu().numpy()
    if np.ptp(values) == 0:
        return 0.0
    steps = np.repeat(np.arange(len(values)), values.shape[1])
    return float(spearmanr(steps, values.ravel()).statistic)
