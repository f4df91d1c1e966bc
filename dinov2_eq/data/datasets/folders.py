"""Datasets of image files: any folder tree, class folders, and ImageNet's layout."""

import logging
import os
from pathlib import Path

import numpy as np

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.datasets.decode import EncodedImages
from dinov2_eq.data.datasets.devkit import DEVKIT_META, VAL_LABELS, read_devkit
from dinov2_eq.data.datasets.listing import (
    EXTENSIONS,
    LeftOut,
    check_folder,
    describe,
    list_folders,
    list_images,
    warn_left_out,
)

logger = logging.getLogger(__name__)


class Folder(EncodedImages):
    """All images below `root`, at any depth, in the order of their paths, without labels."""

    labels_hint = "Folder has no labels; if the images are in one folder per class, write ImageFolder:root=..."

    def __init__(self, root: str) -> None:
        self.root = check_folder(root)
        left_out = LeftOut(self.root.joinpath)
        self._set_paths(list_images(self.root, left_out), left_out)

    def _set_paths(self, paths: list[str], left_out: LeftOut) -> None:
        skipped = left_out.by_kind()
        if not paths:
            others = describe(skipped, "; skipped: ")
            raise DataError(f"{self.root} holds no images (looked for {', '.join(EXTENSIONS)}, at any depth){others}")
        warn_left_out(str(self.root), skipped)
        # An array instead of a list, so that forked workers share it and millions of paths take little memory.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._paths[index]))

    def content(self, index: int) -> Path:
        return Path(self.name(index))


class ImageFolder(Folder):
    """Images in one folder per class below `root`; labels are ranks of the folders' names, empty folders included."""

    def __init__(self, root: str) -> None:
        self.root = check_folder(root)
        self._set_classes(list_folders(self.root))

    def _set_classes(self, class_names: list[str]) -> None:
        left_out = LeftOut(self.root.joinpath)
        kind = "images beside the class folders" if class_names else "images"
        for path in list_images(self.root, left_out, skip=set(class_names)):
            left_out.add(kind, path)
        if not class_names:
            others = describe(left_out.by_kind(), "; it holds ")
            raise DataError(
                f"{self.root} has no class folders{others}; for unlabelled images write Folder:root={self.root}"
            )
        self.class_names = class_names
        paths, labels = [], []
        for label, class_name in enumerate(class_names):
            if (self.root / class_name).is_dir():
                of_class = list_images(self.root, left_out, start=class_name)
                paths += of_class
                labels += [label] * len(of_class)
        self._set_paths(paths, left_out)
        self.labels = np.array(labels, dtype=np.int64)


class ImageNetSplit(ImageFolder):
    """A split of ImageNet with WordNet folders; labels are ranks among the folders of train/, so that splits agree."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root / split
        train_classes = list_folders(root / "train") if (root / "train").is_dir() else []
        unknown = sorted(set(list_folders(self.root)) - set(train_classes)) if train_classes else []
        if unknown:
            raise DataError(
                f"{self.root} has class folders that {root / 'train'} does not have: {', '.join(unknown[:5])}"
            )
        self._set_classes(train_classes or list_folders(self.root))


class FlatImageNetVal(Folder):
    """ImageNet's val/ILSVRC2012_val_*.JPEG as unpacked, with labels if the development kit exists."""

    labels_hint = (
        f"val/ has no class folders: put {VAL_LABELS} and {DEVKIT_META} of ILSVRC2012_devkit_t12/data next to it, "
        "or sort the images into val/<wnid>/."
    )

    def __init__(self, root: Path) -> None:
        super().__init__(str(root / "val"))
        self._devkits = (root, root / "data", root / "ILSVRC2012_devkit_t12" / "data")

    def read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        for devkit in self._devkits:
            if (devkit / VAL_LABELS).is_file() and (devkit / DEVKIT_META).is_file():
                labels, class_names = read_devkit(devkit)
                if len(labels) != len(self):
                    raise DataError(
                        f"{devkit / VAL_LABELS} has {len(labels)} lines, but {self.root} holds {len(self)} images"
                    )
                return labels, class_names
        return None, None


def imagenet(root: str, split: str = "TRAIN", extra: str = "") -> ImageDataset:
    """ImageNet in its standard layout: train/<wnid>/, and val/<wnid>/ or val/ILSVRC2012_val_*.JPEG.

    `extra` is ignored; it is accepted because DINOv2's data strings have it.
    """
    if extra:
        logger.info("extra=%s is not needed: the folders themselves are read", extra)
    check_split(split, ("TRAIN", "VAL"))
    folder = check_folder(os.path.join(check_folder(root), split.lower()))
    if split == "VAL" and not list_folders(folder):
        return FlatImageNetVal(Path(root))
    return ImageNetSplit(Path(root), split.lower())
