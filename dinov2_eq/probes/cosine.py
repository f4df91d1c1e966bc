"""Cosine distances that are exact even if all features are nearly alike, as in an untrained backbone.

With LayerScale 1e-5, the class tokens of different images agree in four digits or more and their cosines in eight, more
than float32 can resolve. For unit vectors a and b,

    1 - cos(a, b) = |a - b|^2 / 2

Everything here is therefore computed in float64 from unit vectors minus their mean. Subtracting the part that all
vectors share first keeps their differences from being rounded away.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_DISTANCES = 2**25  # distances of one chunk: 256 MiB in float64
MAX_ROWS = 2**16  # rows of a gallery that are converted to float64 at once: 512 MiB for D = 1024


def mean_direction(features: Tensor) -> Tensor:
    """Mean of the rows of [N, D], each scaled to length 1: [D] float64."""
    total = sum(F.normalize(rows.double(), dim=1).sum(dim=0) for rows in features.split(MAX_ROWS))
    return total / len(features)


def directions(features: Tensor, centre: Tensor) -> Tensor:
    """Rows of [N, D], each scaled to length 1, minus `centre` [D]: [N, D] float64."""
    return F.normalize(features.double(), dim=1) - centre


def cosine_distances(first: Tensor, second: Tensor) -> Tensor:
    """Distances 1 - cosine between all pairs of rows: [n, m] float64, at least 0.

    Args:
        first, second: [n, D] and [m, D], from `directions` with the same centre.
    """
    squares = first.square().sum(dim=1)[:, None] + second.square().sum(dim=1)
    return torch.addmm(squares, first, second.T, beta=0.5, alpha=-1).clamp_(min=0)


def nearest_neighbours(queries: Tensor, gallery: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Finds the k rows of `gallery` with the smallest cosine distance to each query, nearest first.

    Args:
        queries: [M, D].
        gallery: [N, D]; everything is computed on its device.
        k: in 1 .. N.

    Returns:
        the distances, 1 - cosine, [M, k] float64, and the indices of the rows in `gallery`, [M, k] int64. The order of
        rows at equal distances is arbitrary.
    """
    centre = mean_direction(gallery)
    distances = torch.empty(len(queries), 0, dtype=torch.float64, device=gallery.device)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=gallery.device)
    for start in range(0, len(gallery), MAX_ROWS):
        rows = directions(gallery[start : start + MAX_ROWS], centre)
        nearest = [
            cosine_distances(directions(part.to(rows.device), centre), rows).topk(min(k, len(rows)), largest=False)
            for part in queries.split(max(1, MAX_DISTANCES // len(rows)))
        ]
        distances = torch.cat([distances, torch.cat([part.values for part in nearest])], dim=1)
        indices = torch.cat([indices, torch.cat([part.indices for part in nearest]) + start], dim=1)
        distances, kept = distances.topk(min(k, distances.shape[1]), largest=False)
        indices = indices.gather(1, kept)
    return distances, indices
