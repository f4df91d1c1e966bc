"""Labelled images for classification: the same classes everywhere, subsets by class, and a held-out part."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.datasets import DataError, ImageDataset, build_dataset, require_labels
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.data.seeding import Stream, torch_generator

ALL_IMAGES = -1  # of each class
NUM_SHOWN = 5  # labels in a message


class LabelledImages(NamedTuple):
    dataset: ImageDataset
    indices: np.ndarray  # [N] int64, those of the dataset that take part, ascending
    labels: Tensor  # [N] int64, 0 .. num_classes - 1; every class has training images

    def take(self, positions: Tensor) -> "LabelledImages":
        """The images at these places of `indices`."""
        return self._replace(indices=self.indices[positions.numpy()], labels=self.labels[positions])


def read_labelled(train: str, others: Sequence[str], what: str, max_images: int | None = None) -> list[LabelledImages]:
    """Opens a training dataset and those it is to answer for; labels that `train` does not use are closed up.

    Args:
        train, others: data strings.
        what: for which purpose, for messages: "k-NN", ...
        max_images: of each dataset, the first so many of a fixed shuffle; None: all.

    Returns:
        `train`, then the `others`.

    Raises:
        DataError: missing labels, a single class, or another meaning of the labels than that of `train`.
    """
    found = []
    for data_string in (train, *others):
        dataset = build_dataset(data_string)
        labels = require_labels(dataset, what)
        indices = fixed_subset(len(dataset), len(dataset) if max_images is None else max_images)
        if not len(indices):
            raise DataError(f"{what} needs images, and {data_string!r} has none.")
        found.append((dataset, indices, labels[indices]))
    classes = np.unique(found[0][2])
    if len(classes) < 2:
        raise DataError(
            f"{what} needs two classes or more, and all {len(found[0][1])} images of {train!r} that are used have "
            f"label {classes[0]}. Use data with several classes" + _or_more_images(max_images)
        )
    for dataset, _, labels in found[1:]:
        _require_known(classes, train, dataset, labels, what, max_images)
        _require_same_names(found[0][0], dataset, labels)
    return [
        LabelledImages(dataset, indices, torch.from_numpy(np.searchsorted(classes, labels)))
        for dataset, indices, labels in found
    ]


def _require_known(
    classes: np.ndarray, train: str, dataset: ImageDataset, labels: np.ndarray, what: str, max_images: int | None
) -> None:
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        shown = ", ".join(map(str, unknown[:NUM_SHOWN])) + (", ..." if len(unknown) > NUM_SHOWN else "")
        raise DataError(
            f"{what}: {len(unknown)} of the {len(np.unique(labels))} classes of {dataset.data_string!r} have no image "
            f"in {train!r} (labels {shown}), so no answer about them can be right. Use datasets with the same classes"
            + _or_more_images(max_images)
        )


def _require_same_names(train: ImageDataset, dataset: ImageDataset, labels: np.ndarray) -> None:
    if train.class_names is None or dataset.class_names is None:
        return
    for label in np.unique(labels).tolist():
        if label < len(train.class_names) and train.class_names[label] != dataset.class_names[label]:
            raise DataError(
                f"Label {label} is {train.class_names[label]!r} in {train.data_string!r} and "
                f"{dataset.class_names[label]!r} in {dataset.data_string!r}. Give both the same classes: class folders "
                "are numbered in the order of their names, so neither may lack one (an empty folder counts)."
            )


def _or_more_images(max_images: int | None) -> str:
    return "." if max_images is None else f", or raise --max-images (it is {max_images})."


def draw_per_class(labels: Tensor, num_images: int, seed: int, flag: str) -> Tensor:
    """Places in `labels` of `num_images` images of each class, drawn from `seed`, ascending.

    Raises:
        ValueError: the number is not positive, or a class has fewer images; `flag` is where the number comes from.
    """
    if num_images < 1:
        raise ValueError(f"{flag} {num_images}: give numbers of images from 1 up, or -1 for all")
    counts = labels.bincount()
    scarce = (counts < num_images).nonzero().flatten().tolist()
    if scarce:
        raise ValueError(
            f"{flag} {num_images} is more than {len(scarce)} of the {len(counts)} classes have: class {scarce[0]} has "
            f"{counts[scarce[0]]} training images. Give at most {counts.min()}, or more data"
        )
    return (_rank_in_class(labels, torch_generator(Stream.SUBSET, seed)) < num_images).nonzero().flatten()


def draw_subset(images: LabelledImages, n_per_class: int, seed: int) -> LabelledImages:
    """`n_per_class` images of each class, -1: all; see `draw_per_class`."""
    if n_per_class == ALL_IMAGES:
        return images
    return images.take(draw_per_class(images.labels, n_per_class, seed, "--n-per-class"))


def split_held_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Images to train on, and images to hold out: a part of each class, drawn from `seed`.

    A class gives about `share` of its images, at least one where it has two, and never the last one.

    Raises:
        ValueError: a share outside (0, 1), or no class has two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share of training images to hold out must be between 0 and 1, got {share}")
    counts = images.labels.bincount()
    quota = (counts * share).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    held_out = _rank_in_class(images.labels, torch_generator(Stream.SUBSET, seed, 1)) < quota[images.labels]
    if not held_out.any():
        raise ValueError(
            "Each class has a single training image, so none can be held out to choose by; give two or more of each, "
            "or choose by other images (--select-on-val of linear, --finetune-on-val of logreg)"
        )
    return tuple(images.take(chosen.nonzero().flatten()) for chosen in (~held_out, held_out))


def _rank_in_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """[N] int64: the place of each image in a random order of the images of its class, from 0."""
    order = torch.randperm(len(labels), generator=generator)
    grouped = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[grouped] = torch.arange(len(labels)) - first[labels[grouped]]
    return rank
