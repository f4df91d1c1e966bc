"""CIFAR-10 from its Python archive or from Parquet files; nothing is downloaded."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinov2_eq.data.datasets.base import DataError, ImageDataset
from dinov2_eq.data.datasets.data_string import check_split
from dinov2_eq.data.datasets.listing import check_folder
from dinov2_eq.data.datasets.parquet import Parquet

BATCHES_FOLDER = "cifar-10-batches-py"
BATCH_FILES = {"TRAIN": [f"data_batch_{number}" for number in range(1, 6)], "TEST": ["test_batch"]}
CLASS_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# (top-level module, name) of everything that pickled arrays refer to, depending on the protocol.
ARRAY_PARTS = {
    *(("numpy", name) for name in ("_reconstruct", "_frombuffer", "ndarray", "dtype")),
    ("_codecs", "encode"),
}


class _BatchUnpickler(pickle.Unpickler):
    """An unpickler that only creates arrays, even if a damaged file asks for something else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0], name) in ARRAY_PARTS:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads pixels [N, 3072] uint8 and labels [N] int64 from a file of the archive.

    Raises:
        DataError: the file is damaged.
    """
    try:
        with open(path, "rb") as file:
            batch = _BatchUnpickler(file, encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.array(batch[b"labels"])
        whole = pixels.shape == (len(labels), 3072) and pixels.dtype == np.uint8 and labels.dtype.kind in "iu"
        if not whole or not np.isin(labels, range(len(CLASS_NAMES))).all():
            raise ValueError(f"pixels {pixels.shape} of {pixels.dtype}, labels {labels.shape} of {labels.dtype}")
    except Exception as error:  # unpickling a damaged file may raise anything
        raise DataError(f"{path} is damaged: {error}. Unpack cifar-10-python.tar.gz again") from None
    return pixels.astype(np.uint8), labels.astype(np.int64)


class CIFAR10Batches(ImageDataset):
    """CIFAR-10 from the unpacked files of cifar-10-python.tar.gz."""

    def __init__(self, folder: Path, split: str) -> None:
        self.class_names = CLASS_NAMES
        self.split = split
        pixels, labels = [], []
        for file_name in BATCH_FILES[split]:
            if not (folder / file_name).is_file():
                raise DataError(f"{folder} lacks {file_name}; unpack cifar-10-python.tar.gz again")
            batch = _read_batch(folder / file_name)
            pixels.append(batch[0])
            labels.append(batch[1])
        self._pixels = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)  # [N, 32, 32, 3] uint8
        self.labels = np.concatenate(labels)

    def __len__(self) -> int:
        return len(self._pixels)

    def name(self, index: int) -> str:
        return f"CIFAR10 {self.split} image {index}"

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._pixels[index]))


def cifar10(root: str, split: str = "TRAIN") -> ImageDataset:
    """CIFAR-10 in `root`, which is or contains cifar-10-batches-py/, or contains train.parquet and test.parquet."""
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
