"""Datasets, built from data strings such as `ImageFolder:root=/data/birds`."""

import inspect
from collections.abc import Callable

from dinov2_eq.data.datasets.base import DataError, ImageDataset, PairDataset, UnreadableImage, require_labels
from dinov2_eq.data.datasets.cifar10 import cifar10
from dinov2_eq.data.datasets.data_string import build_from_table
from dinov2_eq.data.datasets.folders import Folder, ImageFolder, imagenet
from dinov2_eq.data.datasets.parquet import Parquet
from dinov2_eq.data.datasets.shapes import Shapes
from dinov2_eq.data.datasets.threediebench import ThreeDIEBench
from dinov2_eq.data.datasets.webdataset import ClassTars, WebDataset

# To add your own dataset, add a line here. The arguments of the class or function are the keys of its data string; for
# an `EncodedImages`, so are the fields of `decode.Decoding`.
DATASETS: dict[str, Callable[..., ImageDataset]] = {
    "Folder": Folder,
    "ImageFolder": ImageFolder,
    "ImageNet": imagenet,
    "ImageNet22k": ClassTars,
    "CIFAR10": cifar10,
    "Parquet": Parquet,
    "WebDataset": WebDataset,
    "Shapes": Shapes,
    "3DIEBench": ThreeDIEBench,
}


def build_dataset(string: str) -> ImageDataset:
    """Builds the dataset that a data string describes.

    Raises:
        DataError: the string, or the data that it points to, is wrong.
    """
    return build_from_table(string, DATASETS)


def pair_components(string: str) -> tuple[str, ...] | None:
    """Returns the names of the parameters in theta if a data string names a data set of pairs; None: single images.

    Opens nothing. The entry of `DATASETS` must be the `PairDataset` itself, not a function that returns one.
    """
    entry = DATASETS.get(string.partition(":")[0])
    return entry.components if inspect.isclass(entry) and issubclass(entry, PairDataset) else None


__all__ = [
    "DATASETS",
    "DataError",
    "ImageDataset",
    "PairDataset",
    "UnreadableImage",
    "build_dataset",
    "pair_components",
    "require_labels",
]
