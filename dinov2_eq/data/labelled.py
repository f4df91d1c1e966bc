"""Labelled images for classification: checks that datasets have the same classes, and draws subsets of each class."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.class_mapping import ClassMapping, read_class_mapping
from dinov2_eq.data.datasets import DataError, ImageDataset, build_dataset, require_labels
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.data.seeding import Stream, torch_generator

ALL_IMAGES = -1  # as the number of images per class
NUM_SHOWN = 5  # labels in a message

logger = logging.getLogger(__name__)


class LabelledImages(NamedTuple):
    """A part of a dataset, with labels."""

    dataset: ImageDataset
    indices: np.ndarray  # [N] int64, into the dataset, ascending
    labels: Tensor  # [N] int64: classes of the training images, 0 .. num_classes - 1; or indices into `classes`
    classes: Tensor | None = None  # [M] int64: the only classes that a prediction is chosen from; None: all

    def take(self, positions: Tensor) -> "LabelledImages":
        """Selects the images at these positions of `indices`."""
        return self._replace(indices=self.indices[positions.numpy()], labels=self.labels[positions])


def read_labelled(
    train: str,
    others: Sequence[str],
    what: str,
    max_images: int | None = None,
    class_mappings: Sequence[Path | None] | None = None,
    classes_without_images: bool = False,
) -> list[LabelledImages]:
    """Opens a training dataset and its test sets, and renumbers the labels to the classes that `train` uses.

    Args:
        train, others: data strings.
        what: the purpose, such as "k-NN", for messages.
        max_images: number of images to use of each dataset, the first of a fixed shuffle; None: all.
        class_mappings: one entry for each of the `others`: a file, see `read_class_mapping`, or None if it uses the
            labels of `train`. None: all of them do.
        classes_without_images: keep all classes of `train`, also those without an image among the `max_images`.

    Returns:
        `train`, then the `others`.

    Raises:
        DataError: labels are missing, there is only one class, or labels do not mean the same as in `train`.
        OSError, ValueError: from `read_class_mapping`.
    """
    mappings = [path and read_class_mapping(path) for path in class_mappings or [None] * len(others)]
    opened = []
    for data_string in (train, *others):
        dataset = build_dataset(data_string)
        labels = require_labels(dataset, what)
        indices = fixed_subset(len(dataset), len(dataset) if max_images is None else max_images)
        if not len(indices):
            raise DataError(f"{what} needs images, and {data_string!r} has none.")
        opened.append((dataset, indices, labels[indices]))
    classes = np.unique(opened[0][0].labels if classes_without_images else opened[0][2])
    more_help = max_images is not None and not classes_without_images
    or_more = f", or raise --max-images (it is {max_images})" if more_help else ""
    if len(classes) < 2:
        raise DataError(
            f"{what} needs at least two classes, but all {len(opened[0][1])} images of {train!r} that are used have "
            f"label {classes[0]}. Use data with several classes{or_more}."
        )

    def places(labels: np.ndarray) -> Tensor:
        return torch.from_numpy(np.searchsorted(classes, labels))

    (train_dataset, indices, labels), *rest = opened
    images = [LabelledImages(train_dataset, indices, places(labels))]
    for (dataset, indices, labels), mapping in zip(rest, mappings, strict=True):
        if mapping is None:
            _require_known(classes, train, dataset, labels, what, or_more)
            _require_equal_names(train_dataset, dataset, labels)
            images.append(LabelledImages(dataset, indices, places(labels)))
        else:
            _require_fit(mapping, classes, train, dataset, labels, or_more)
            _warn_of_other_names(train_dataset, dataset, labels, mapping.labels)
            images.append(LabelledImages(dataset, indices, torch.from_numpy(labels), places(mapping.labels)))
    return images


def _require_known(
    classes: np.ndarray, train: str, dataset: ImageDataset, labels: np.ndarray, what: str, or_more: str
) -> None:
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        shown = ", ".join(map(str, unknown[:NUM_SHOWN])) + (", ..." if len(unknown) > NUM_SHOWN else "")
        raise DataError(
            f"{what}: {len(unknown)} of the {len(np.unique(labels))} classes of {dataset.data_string!r} have no image "
            f"in {train!r} (labels {shown}), so their images cannot be classified correctly. Use datasets with the "
            f"same classes{or_more}."
        )


def _require_equal_names(train: ImageDataset, dataset: ImageDataset, labels: np.ndarray) -> None:
    present = np.unique(labels)
    for label, name, trained in _other_names(train, dataset, present, present):
        raise DataError(
            f"Label {label} is {trained!r} in {train.data_string!r} and {name!r} in {dataset.data_string!r}. Use the "
            "same classes in both: class folders are numbered in the order of their names, so neither may lack one "
            "(an empty folder counts)."
        )


def _require_fit(
    mapping: ClassMapping,
    classes: np.ndarray,
    train: str,
    dataset: ImageDataset,
    labels: np.ndarray,
    or_more: str,
) -> None:
    if labels.max() >= len(mapping.labels):
        raise DataError(
            f"{dataset.data_string!r} has label {labels.max()}, but class mapping {mapping.path} only has entries for "
            f"0 to {len(mapping.labels) - 1}. Add an entry for each label"
        )
    if len(unknown := np.setdiff1d(mapping.labels, classes)):
        raise DataError(
            f"Class mapping {mapping.path} contains label {unknown[0]}, but {train!r} has no image with it. Map to "
            f"training labels{or_more}."
        )


def _warn_of_other_names(train: ImageDataset, dataset: ImageDataset, labels: np.ndarray, mapping: np.ndarray) -> None:
    """Logs classes that are mapped to a class of another name, which may be intended."""
    present = np.unique(labels)
    if others := _other_names(train, dataset, present, mapping[present]):
        _, name, trained = others[0]
        words = "%s: %d of its classes have other names than the training classes they are mapped to: %r is %r, ..."
        logger.warning(words, dataset.data_string, len(others), name, trained)


def _other_names(
    train: ImageDataset, dataset: ImageDataset, labels: np.ndarray, trained: np.ndarray
) -> list[tuple[int, str, str]]:
    """Lists (label, its name, name of the training class) where the names differ.

    Args:
        labels, trained: [n] labels of `dataset`, and the training labels that they are mapped to.
    """
    if train.class_names is None or dataset.class_names is None:
        return []
    return [
        (label, dataset.class_names[label], train.class_names[number])
        for label, number in zip(labels.tolist(), trained.tolist(), strict=True)
        if number < len(train.class_names) and train.class_names[number] != dataset.class_names[label]
    ]


def draw_per_class(labels: Tensor, num_images: int, seed: int, flag: str) -> Tensor:
    """Draws `num_images` images of each class with `seed`; returns their positions in `labels`, ascending.

    Args:
        flag: the command-line flag that sets the number, for messages.

    Raises:
        ValueError: the number is not positive, or a class has fewer images.
    """
    if num_images < 1:
        raise ValueError(f"{flag} {num_images}: give a number of images of at least 1, or -1 for all")
    counts = labels.bincount()
    scarce = (counts < num_images).nonzero().flatten().tolist()
    if scarce:
        raise ValueError(
            f"{flag} {num_images} is more than {len(scarce)} of the {len(counts)} classes have: class {scarce[0]} has "
            f"{counts[scarce[0]]} training images. Give at most {counts.min()}, or more data"
        )
    return (_rank_in_class(labels, torch_generator(Stream.SUBSET, seed)) < num_images).nonzero().flatten()


def draw_subset(images: LabelledImages, n_per_class: int, seed: int) -> LabelledImages:
    """Draws `n_per_class` images of each class (-1: all), see `draw_per_class`."""
    if n_per_class == ALL_IMAGES:
        return images
    return images.take(draw_per_class(images.labels, n_per_class, seed, "--n-per-class"))


def split_held_out(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """Splits images into a training and a held-out part, drawn with `seed`.

    About `share` of each class is held out: at least one image of a class that has two or more, and never all.

    Raises:
        ValueError: the share is outside (0, 1), or no class has two images.
    """
    if not 0 < share < 1:
        raise ValueError(f"The share of training images to hold out must be between 0 and 1, got {share}")
    counts = images.labels.bincount()
    quota = (counts * share).round().long().clamp(min=1).minimum((counts - 1).clamp(min=0))
    held_out = _rank_in_class(images.labels, torch_generator(Stream.SUBSET, seed, 1)) < quota[images.labels]
    if not held_out.any():
        raise ValueError(
            "Each class has a single training image, so none can be held out for selection; use two or more of each, "
            "or select on other images (--select-on-val of linear, --finetune-on-val of logreg)"
        )
    return tuple(images.take(chosen.nonzero().flatten()) for chosen in (~held_out, held_out))


def _rank_in_class(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Position of each image in a random order of the images of its class, from 0: [N] int64."""
    order = torch.randperm(len(labels), generator=generator)
    grouped = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(order)
    rank[grouped] = torch.arange(len(labels)) - first[labels[grouped]]
    return rank
