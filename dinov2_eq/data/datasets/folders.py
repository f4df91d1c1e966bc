"""Images as files: any tree, class folders, and ImageNet's layout."""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.datasets.decode import decode_image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
VAL_LABELS = "ILSVRC2012_validation_ground_truth.txt"
DEVKIT_META = "meta.mat"


class Folder(ImageDataset):
    """All images below `root`, at any depth, in the order of their paths; no labels."""

    labels_hint = "Folder has no labels; where the images lie in one folder for each class, write ImageFolder:root=..."

    def __init__(self, root: str) -> None:
        self.root = check_folder(root)
        self._set_paths(list_images(self.root))

    def _set_paths(self, paths: list[str]) -> None:
        if not paths:
            raise DataError(f"{self.root} holds no images (looked for {', '.join(EXTENSIONS)}, at any depth)")
        # One array instead of a list: forked workers share it, and millions of paths stay small.
        self._paths = np.array([os.fsencode(path) for path in paths])

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        return str(self.root / os.fsdecode(self._paths[index]))

    def read(self, index: int) -> Image.Image:
        path = self.name(index)
        return decode_image(Path(path), path)


class ImageFolder(Folder):
    """One folder below `root` for each class; the label is the rank of the folder's name, empty folders included."""

    def __init__(self, root: str) -> None:
        self.root = check_folder(root)
        self._set_classes(list_folders(self.root))

    def _set_classes(self, class_names: list[str]) -> None:
        if not class_names:
            raise DataError(f"{self.root} has no class folders; for unlabelled images write Folder:root={self.root}")
        self.class_names = class_names
        paths, labels = [], []
        for label, class_name in enumerate(class_names):
            if (self.root / class_name).is_dir():
                found = [os.path.join(class_name, path) for path in list_images(self.root / class_name)]
                paths += found
                labels += [label] * len(found)
        self._set_paths(paths)
        self.labels = np.array(labels, dtype=np.int64)


class ImageNetSplit(ImageFolder):
    """One split with WordNet folders; labels are ranks among the folders of train/, so that both splits agree."""

    def __init__(self, root: Path, split: str) -> None:
        self.root = root / split
        train_classes = list_folders(root / "train") if (root / "train").is_dir() else []
        unknown = sorted(set(list_folders(self.root)) - set(train_classes)) if train_classes else []
        if unknown:
            raise DataError(f"{self.root} has class folders that {root / 'train'} has not: {', '.join(unknown[:5])}")
        self._set_classes(train_classes or list_folders(self.root))


class FlatImageNetVal(Folder):
    """val/ILSVRC2012_val_*.JPEG as they come out of the archive; labels from the development kit if it is there."""

    labels_hint = (
        f"val/ has no class folders: put {VAL_LABELS} and {DEVKIT_META} of ILSVRC2012_devkit_t12/data beside it, "
        "or sort the images into val/<wnid>/."
    )

    def __init__(self, root: Path) -> None:
        super().__init__(str(root / "val"))
        for devkit in (root, root / "data", root / "ILSVRC2012_devkit_t12" / "data"):
            if (devkit / VAL_LABELS).is_file() and (devkit / DEVKIT_META).is_file():
                self.labels, self.class_names = self._read_devkit(devkit)
                break

    def _read_devkit(self, devkit: Path) -> tuple[np.ndarray, list[str]]:
        from scipy.io import loadmat  # only here, and slow to import

        synsets = loadmat(devkit / DEVKIT_META, squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        class_names = sorted(str(wnid) for wnid in leaves["WNID"])
        # The development kit numbers the classes in an order of its own, from 1.
        label_of_id = {
            int(number): class_names.index(str(wnid))
            for number, wnid in zip(leaves["ILSVRC2012_ID"], leaves["WNID"], strict=True)
        }
        numbers = np.loadtxt(devkit / VAL_LABELS, dtype=np.int64, ndmin=1)
        if len(numbers) != len(self):
            raise DataError(f"{devkit / VAL_LABELS} has {len(numbers)} lines, but {self.root} holds {len(self)} images")
        return np.array([label_of_id[int(number)] for number in numbers], dtype=np.int64), class_names


def imagenet(root: str, split: str = "TRAIN") -> ImageDataset:
    """ImageNet in its stock layout: train/<wnid>/, and val/<wnid>/ or val/ILSVRC2012_val_*.JPEG."""
    check_split(split, ("TRAIN", "VAL"))
    folder = check_folder(os.path.join(check_folder(root), split.lower()))
    if split == "VAL" and not list_folders(folder):
        return FlatImageNetVal(Path(root))
    return ImageNetSplit(Path(root), split.lower())


def check_folder(path: str) -> Path:
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}")
    return Path(path)


def list_folders(root: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))


def list_images(root: Path) -> list[str]:
    """Paths below `root` and relative to it, sorted; links are followed, hidden files are not read."""
    found, visited = [], set()
    for folder, subfolders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads back up
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = os.path.relpath(folder, root)
        found += [
            os.path.normpath(os.path.join(relative, name))
            for name in files
            if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
        ]
    return sorted(found)
