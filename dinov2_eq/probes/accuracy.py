"""Accuracy from counts by class, which add up over batches and processes."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum

METRICS = ("mean_accuracy", "mean_per_class_accuracy", "per_class_accuracy")
MAX_SCORES = 2**26  # in memory at a time


class ClassHits(NamedTuple):
    """How often classifiers are right, by class; on the CPU."""

    top1: Tensor  # [H, C] float64: images whose label gets the highest score of classifier h
    top5: Tensor  # [H, C]: the label is among the five highest
    total: Tensor  # [C]: images of the class

    def summed(self) -> "ClassHits":
        """The counts of all processes together; all of them call it."""
        return ClassHits(*(all_reduce_sum(count) for count in self))

    def summary(self, classifier: int, metric: str) -> dict[str, Any]:
        """Per cent, {"top1": ..., "top5": ...} by name of the metric; top5 is left out below 5 classes.

        mean_accuracy is over images, mean_per_class_accuracy over classes that have images. Where `metric` is
        per_class_accuracy, the accuracies of the classes (None: no images) are there too.
        """
        found: dict[str, Any] = {name: {} for name in METRICS if name != "per_class_accuracy" or name == metric}
        present = self.total > 0
        for name, hits in (("top1", self.top1[classifier]), ("top5", self.top5[classifier])):
            if name == "top5" and len(self.total) < 5:
                continue
            by_class = 100 * hits / self.total  # NaN without images
            found["mean_accuracy"][name] = (100 * hits.sum() / self.total.sum()).item()
            found["mean_per_class_accuracy"][name] = by_class[present].mean().item()
            if metric == "per_class_accuracy":
                found[metric][name] = [
                    value if there else None for value, there in zip(by_class.tolist(), present.tolist(), strict=True)
                ]
        return found

    def top1_percent(self, metric: str) -> Tensor:
        """[H] by which classifiers are compared; per_class_accuracy compares by its mean."""
        if metric == "mean_accuracy":
            return 100 * self.top1.sum(dim=1) / self.total.sum()
        present = self.total > 0
        return 100 * (self.top1[:, present] / self.total[present]).mean(dim=1)


def count_hits(weight: Tensor, bias: Tensor, features: Tensor, labels: Tensor) -> ClassHits:
    """Scores linear classifiers.

    A classifier whose scores of an image are NaN or infinite is wrong about it.

    Args:
        weight: [H, C, D] and bias [H, C] of H classifiers.
        features: [n, D] and labels [n] int64, which may be empty; computed on the device of `weight`.
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
