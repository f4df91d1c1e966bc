"""Cosine distances of features, exact also where all features are nearly alike, as an untrained backbone's are.

With LayerScale 1e-5 the class tokens of different images agree in four digits or more, and their cosines in eight: more
than float32 can tell. Between unit vectors a and b

    1 - cos(a, b) = |a - b|^2 / 2

so everything here is computed in float64 from unit vectors minus their mean: what they share is gone before it can
round off what they differ in.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DISTANCES = 2**25  # in memory at a time: 256 MiB
MAX_ROWS = 2**16  # of a gallery, in float64 at a time


def mean_direction(features: Tensor) -> Tensor:
    """[D] float64: the mean of the rows of [N, D], each scaled to length 1."""
    total = sum(F.normalize(rows.double(), dim=1).sum(dim=0) for rows in features.split(MAX_ROWS))
    return total / len(features)


def directions(features: Tensor, centre: Tensor) -> Tensor:
    """[N, D] float64: the rows of [N, D], each scaled to length 1, minus `centre` [D]."""
    return F.normalize(features.double(), dim=1) - centre


def cosine_distances(first: Tensor, second: Tensor) -> Tensor:
    """1 - cosine of each row of [n, D] with each row of [m, D]: [n, m] float64, at least 0.

    Args:
        first, second: `directions` around the same centre.
    """
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return torch.addmm(squares, first, second.T, beta=0.5, alpha=-1).clamp_(min=0)


def nearest_neighbours(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k rows of `gallery` that are nearest to each query by cosine, nearest first.

    Args:
        queries: [M, D].
        gallery: [N, D]; everything is computed on its device.
        k: in 1 .. N.

    Returns:
        distances [M, k] float64, which are 1 - cosine, and the places of those rows in `gallery`, [M, k] int64. Rows
        at equal distances come in any order.
    """
    centre = mean_direction(gallery)
    distances = torch.empty(len(queries), 0, dtype=torch.float64, device=gallery.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=gallery.device)
    for start in range(0, len(gallery), MAX_ROWS):
        rows = directions(gallery[start : start + MAX_ROWS], centre)
        found = [
            cosine_distances(directions(part.to(rows.device), centre), rows).topk(min(k, len(rows)), largest=False)
            for part in queries.split(max(1, MAX_DISTANCES // len(rows)))
        ]
        distances = torch.cat([distances, torch.cat([part.values for part in found])], dim=1)
        indices = torch.cat([indices, torch.cat([part.indices for part in found]) + start], dim=1)
        distances, kept = distances.topk(min(k, distances.shape[1]), largest=False)
        indices = indices.gather(1, kept)
    return distances, indices
