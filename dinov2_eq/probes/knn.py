"""Weighted k-NN classification (Wu et al., arXiv 1805.01978, section 3.4), as DINO and DINOv2 evaluate."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum
from dinov2_eq.probes.cosine import nearest_neighbours
from dinov2_eq.probes.features import own_share

MAX_VOTES = 2**25  # scores of one chunk, for each k: 256 MiB in float64


def knn_predict(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, ks: Sequence[int], temperature: float = 0.07
) -> Iterator[dict[int, Tensor]]:
    """Yields the votes of the k nearest training images, for one chunk of test images at a time.

    With s_j the cosine similarities of the max(ks) nearest images, and w their softmax at the temperature:

        score(class) = sum of w_j over the k nearest images j with that label

    Distances, weights and scores are float64, and exact even if features are nearly alike; see `probes.cosine`.

    Args:
        train_features: [N, D]; everything is computed on their device.
        train_labels: [N] int64, 0 .. num_classes - 1.
        val_features: [M, D].
        ks: numbers of neighbours, each in 1 .. N.

    Yields:
        scores by k, each [m, num_classes] float64; the chunks of m images follow the order of `val_features`.

    Raises:
        ValueError: a k that is not in 1 .. N.
    """
    num_train = len(train_features)
    wrong = [k for k in ks if not 1 <= k <= num_train]
    if wrong or not ks:
        raise ValueError(
            f"k-NN with k = {', '.join(map(str, wrong)) or 'nothing'} is impossible with {num_train} training images; "
            f"k must be in 1 .. {num_train}. Choose a smaller k, or more training images."
        )
    labels = train_labels.to(train_features.device)
    num_classes = int(labels.max()) + 1
    distances, indices = nearest_neighbours(val_features, train_features, max(ks))  # [M, max_k]
    weights = (-distances / temperature).softmax(dim=1)  # equals that of s_j = 1 - distance: softmax ignores shifts
    chunk = max(1, MAX_VOTES // num_classes)
    for votes, some_weights in zip(labels[indices].split(chunk), weights.split(chunk), strict=True):
        empty = weights.new_zeros(len(votes), num_classes)
        yield {k: empty.scatter_add(1, votes[:, :k], some_weights[:, :k]) for k in ks}


def knn_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    ks: Sequence[int],
    temperature: float = 0.07,
) -> dict[int, dict[str, float]]:
    """Accuracies in per cent, {k: {"top1": ..., "top5": ...}}; with fewer than 5 classes without top5.

    Arguments and errors are those of `knn_predict`. All processes call it with the same arguments, and each scores its
    share of the test images. A class without votes does not count as one of the five guesses, so with few neighbours
    top5 has fewer than five.
    """
    correct = {k: torch.zeros(5, dtype=torch.float64) for k in ks}  # by place in the ranking
    own = own_share(len(val_features))
    start = own.start
    for scores_by_k in knn_predict(train_features, train_labels, val_features[own], ks, temperature):
        for k, scores in scores_by_k.items():
            best, ranking = scores.topk(min(5, scores.shape[1]), dim=1)  # [m, <= 5]
            labels = val_labels[start : start + len(scores)].to(scores.device)
            hits = (ranking == labels[:, None]) & (best > 0)
            correct[k][: hits.shape[1]] += hits.sum(dim=0).cpu()
        start += len(scores)
    accuracies = {}
    for k, hits in correct.items():
        all_reduce_sum(hits)
        accuracies[k] = {"top1": 100 * hits[0].item() / len(val_features)}
        if len(train_labels.unique()) >= 5:
            accuracies[k]["top5"] = 100 * hits.sum().item() / len(val_features)
    return accuracies
