"""Classification accuracy from counts per class, which can be summed over batches and processes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum

METRICS = ("mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy")
MAX_SCORES = 2**26  # scores of one chunk: 256 MiB in float32, and about as much again for the ranking


class ClassHits(NamedTuple):
    """Counts of correct predictions of H classifiers, by class; on the CPU."""

    top1: Tensor  # [H, C] float64: images whose label gets the highest score of classifier h
    top5: Tensor  # [H, C]: the label is among the five highest
    total: Tensor  # [C]: images of the class

    def summed(self) -> "ClassHits":
        """Sums the counts over all processes, which must all call it."""
        return ClassHits(*(all_reduce_sum(count) for count in self))

    def summary(self, classifier: int, metric: str) -> dict[str, Any]:
        """Accuracies in per cent by metric, each {"top1": ..., "top5": ...}; with fewer than 5 classes without top5.

        mean_accuracy is over images, mean_per_class_accuracy over classes that have images. If `metric` is
        per_class_accuracy, the accuracy of each class is included (None: a class without images).
        """
        accuracies: dict[str, Any] = {name: {} for name in METRICS if name != "per_class_accuracy" or name == metric}
        present = self.total > 0
        for name, hits in (("top1", self.top1[classifier]), ("top5", self.top5[classifier])):
            if name == "top5" and len(self.total) < 5:
                continue
            by_class = 100 * hits / self.total  # NaN without images
            accuracies["mean_accuracy"][name] = (100 * hits.sum() / self.total.sum()).item()
            accuracies["mean_per_class_accuracy"][name] = by_class[present].mean().item()
            if metric == "per_class_accuracy":
                accuracies[metric][name] = [
                    value if there else None for value, there in zip(by_class.tolist(), present.tolist(), strict=True)
                ]
        return accuracies

    def top1_percent(self, metric: str) -> Tensor:
        """Top-1 accuracies [H] in per cent, to compare classifiers by; per_class_accuracy compares by the mean."""
        if metric == "mean_accuracy":
            return 100 * self.top1.sum(dim=1) / self.total.sum()
        present = self.total > 0
        return 100 * (self.top1[:, present] / self.total[present]).mean(dim=1)


def count_hits(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> ClassHits:
    """Counts the correct predictions of linear classifiers, on the device of `weight`.

    If its scores for an image are NaN or infinite, a classifier counts as wrong.

    Args:
        weight: [H, C, D], of H classifiers.
        bias: [H, C].
        features: [n, D]; n may be 0.
        labels: [n] int64.
    """
    num_heads, num_classes, _ = weight.shape
    top1, top5 = torch.zeros(2, num_classes, num_heads, dtype=torch.float64, device=weight.device)
    total = torch.zeros(num_classes, dtype=torch.float64, device=weight.device)
    chunk = max(1, MAX_SCORES // (num_heads * num_classes))
    for rows, targets in zip(features.split(chunk), labels.split(chunk), strict=True):
        rows, targets = rows.to(weight), targets.to(weight.device)
        scores = torch.addmm(bias.flatten(), rows, weight.flatten(0, 1).T).unflatten(1, (num_heads, num_classes))
        best, ranking = scores.topk(min(5, num_classes), dim=2)  # [m, H, <= 5]
        right = (ranking == targets[:, None, None]) & best.isfinite()
        top1.index_add_(0, targets, right[:, :, 0].double())
        top5.index_add_(0, targets, right.any(dim=2).double())
        total += targets.bincount(minlength=num_classes)
    return ClassHits(*(count.cpu() for count in (top1.T.contiguous(), top5.T.contiguous(), total)))
