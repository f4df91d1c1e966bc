"""Measures how much the features of an image change when it is transformed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum
from dinov2_eq.probes.cosine import MAX_DISTANCES, cosine_distances, directions, mean_direction
from dinov2_eq.probes.features import own_share

ROUNDING = 1e-13  # relative; distances that differ by less count as equal


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean cosine similarity of corresponding rows of two [N, D] tensors."""
    return F.cosine_similarity(first.double(), second.double(), dim=1).mean().item()


def mean_cosine_of_others(features: Tensor) -> float:
    """Mean cosine similarity of all pairs of different rows of [N, D], as a reference for `mean_cosine`.

    Raises:
        ValueError: fewer than two rows.
    """
    number = len(features)
    if number < 2:
        raise ValueError(f"Comparing different images needs at least 2 images, got {number}; give more images.")
    unit = F.normalize(features.double(), dim=1)
    all_pairs, same = unit.sum(dim=0).square().sum(), unit.square().sum()
    return ((all_pairs - same) / (number * (number - 1))).item()


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Share of the queries whose nearest row of the gallery, by cosine, is their own (row i for query i).

    If several rows are equally near, the query counts with the probability of drawing its own row among them: if all
    features are equal, the recall is 1 / N. All processes call it with the same arguments, and each scores its share
    of the queries.

    Args:
        queries, gallery: [N, D], on one device.
    """
    centre = mean_direction(gallery)
    rows = directions(gallery, centre)
    own = own_share(len(queries))
    num_found = torch.zeros(1, dtype=torch.float64)
    answers = torch.arange(len(gallery), device=gallery.device)[own]
    size = max(1, MAX_DISTANCES // len(gallery))
    for chunk, answer in zip(queries[own].split(size), answers.split(size), strict=True):
        query_rows = directions(chunk, centre)
        distances = cosine_distances(query_rows, rows)  # [n, N]
        own_distance = distances.gather(1, answer[:, None])
        tolerance = ROUNDING * (query_rows.square().sum(dim=1)[:, None] + rows.square().sum(dim=1))
        nearer = (distances < own_distance - tolerance).sum(dim=1)
        as_near = (distances <= own_distance + tolerance).sum(dim=1) - nearer  # at least 1, the own row
        num_found += ((nearer == 0) / as_near).double().sum().cpu()
    return all_reduce_sum(num_found).item() / len(queries)
