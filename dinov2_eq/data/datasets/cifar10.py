"""CIFAR-10 from its Python archive or from Parquet files; nothing is downloaded."""

import pickle
from pathlib import Path

import numpy as np
from PIL import Image

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.datasets.folders import check_folder
from dinov2_eq.data.datasets.parquet import Parquet

BATCHES_FOLDER = "cifar-10-batches-py"
BATCH_FILES = {"TRAIN": [f"data_batch_{number}" for number in range(1, 6)], "TEST": ["test_batch"]}
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class CIFAR10Batches(ImageDataset):
    """The files of cifar-10-python.tar.gz, unpacked."""

    def __init__(self, folder: Path, split: str) -> None:
        self.class_names = CLASS_NAMES
        self.split = split
        pixels, labels = [], []
        for file_name in BATCH_FILES[split]:
            if not (folder / file_name).is_file():
                raise DataError(f"{folder} lacks {file_name}; unpack cifar-10-python.tar.gz again")
            with open(folder / file_name, "rb") as file:
                batch = pickle.load(file, encoding="bytes")
            pixels.append(batch[b"data"])
            labels.append(batch[b"labels"])
        self._pixels = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, 32, 32, 3] uint8
        self.labels = np.concatenate(labels).astype(np.int64)

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, index: int) -> str:
        return f"CIFAR10 {self.split} image {index}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._pixels[index]))


def cifar10(root: str, split: str = "TRAIN") -> ImageDataset:
    """`root` holds cifar-10-batches-py/ (or is that folder), or train.parquet and test.parquet."""
    check_split(split, BATCH_FILES)
    folder = check_folder(root)
    for batches in (folder / BATCHES_FOLDER, folder):
        if (batches / BATCH_FILES["TEST"][0]).is_file():
            return CIFAR10Batches(batches, split)
    parquet = folder / f"{split.lower()}.parquet"
    if parquet.is_file():
        dataset = Parquet(str(parquet))
        dataset.class_names = CLASS_NAMES
        return dataset
    raise DataError(f"{root} holds neither {BATCHES_FOLDER}/ nor {parquet.name}")
