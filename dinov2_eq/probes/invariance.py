"""How far the features of an image stay what they are when it is transformed."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum
from dinov2_eq.probes.features import own_share

MAX_SIMILARITIES = 2**25  # in memory at a time
ROUNDING = 1e-12  # similarities that differ by less are equal


def mean_cosine(first: Tensor, second: Tensor) -> float:
    """Mean over the rows of two [N, D] of the cosine similarity of row i with row i."""
    return F.cosine_similarity(first.double(), second.double(), dim=1).mean().item()


def mean_cosine_of_others(features: Tensor) -> float:
    """Mean cosine similarity of row i with row j of [N, D], over all i != j: the scale to read `mean_cosine` by.

    Raises:
        ValueError: fewer than two rows.
    """
    number = len(features)
    if number < 2:
        raise ValueError(f"Two different images cannot be compared, there is {number} of them; give more images.")
    unit = F.normalize(features.double(), dim=1)
    all_pairs, same = unit.sum(dim=0).square().sum(), unit.square().sum()
    return ((all_pairs - same) / (number * (number - 1))).item()


def recall_at_1(queries: Tensor, gallery: Tensor) -> float:
    """Share of the queries whose nearest row of the gallery, by cosine, is their own: row i for query i.

    Where several rows are equally near, a query counts as much as a draw among them would find: with equal features
    everywhere, the recall is 1 / N. All processes call it with the same, and each scores its share of the queries.

    Args:
        queries, gallery: [N, D], on one device.
    """
    # Float64: features of different images may be so alike that their cosines are equal in float32.
    rows = F.normalize(gallery.double(), dim=1)
    own = own_share(len(queries))
    found = torch.zeros(1, dtype=torch.float64)
    answers = torch.arange(len(gallery), device=gallery.device)[own]
    size = max(1, MAX_SIMILARITIES // len(gallery))
    for chunk, answer in zip(queries[own].split(size), answers.split(size), strict=True):
        similarities = F.normalize(chunk.double(), dim=1) @ rows.T  # [n, N]
        wanted = similarities.gather(1, answer[:, None])
        nearer = (similarities > wanted + ROUNDING).sum(dim=1)
        as_near = (similarities >= wanted - ROUNDING).sum(dim=1) - nearer  # at least 1, the own row
        found += ((nearer == 0) / as_near).double().sum().cpu()
    return all_reduce_sum(found).item() / len(queries)
