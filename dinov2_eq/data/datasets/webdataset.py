"""Images in tar files, as WebDataset packs them, read in any order."""

import glob
import logging
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from dinov2_eq.data.datasets.base import DataError, ImageDataset, UnreadableImage
from dinov2_eq.data.datasets.decode import decode_image
from dinov2_eq.data.datasets.tar_index import NO_LABEL, index_tar

logger = logging.getLogger(__name__)

INDEX_THREADS = 16  # they wait for the file system, mostly
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class WebDataset(ImageDataset):
    """The images of uncompressed tar files on a file system.

    Args:
        urls: a path, a glob pattern, or paths with ranges such as train-{000000..000146}.tar; several joined by `::`.
        image: extension of the images, such as `left.png`; by default any usual one.
        label: extension of the files with the label, a whole number.

    A read takes the bytes of its image only, wherever they lie, so that a shuffle over all images costs no more than
    one over separate files.
    """

    labels_hint = (
        "Pack a file with a whole number beside each image, 0001.cls beside 0001.jpg, or name its extension: "
        "WebDataset:urls=...:label=..."
    )

    def __init__(self, urls: str, image: str = "", label: str = "cls") -> None:
        self._shards = list_shards(urls)
        image, label = _check_extension("image", image), _check_extension("label", label)
        logger.info("reading the index of %d tar files, or scanning those that have none", len(self._shards))
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            tables = list(pool.map(lambda shard: index_tar(shard, image, label), self._shards))
        self._ends = np.cumsum([len(table) for table in tables])  # first image after each shard
        self._places = np.concatenate([table[:, :2] for table in tables])  # [num_images, 2]: byte offset, size
        labels = np.concatenate([table[:, 2] for table in tables])
        if (labels != NO_LABEL).any():
            self.labels = labels

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """shard.tar/file, as the tar header has it: cut after 100 characters, maybe with "?" for what is not ASCII."""
        shard, offset = self._shard(index), int(self._places[index, 0])
        try:
            header = self._read_bytes(index, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return f"{shard}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (OSError, tarfile.TarError):
            return f"{shard}, image at byte {offset}"

    def read(self, index: int) -> Image.Image:
        offset, size = self._places[index].tolist()
        try:
            content = self._read_bytes(index, offset, size)
            if len(content) < size:
                raise EOFError("the shard has become shorter since it was indexed")
        except (OSError, EOFError) as error:
            raise UnreadableImage(self.name(index), f"{type(error).__name__}: {error}") from error
        try:
            return decode_image(content, "")
        except UnreadableImage as error:
            raise UnreadableImage(self.name(index), error.reason) from error

    def _shard(self, index: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def _read_bytes(self, index: int, offset: int, size: int) -> bytes:
        with open(self._shard(index), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


def list_shards(urls: str) -> list[str]:
    """The tar files that `urls` stands for, in the order in which it names them.

    Raises:
        DataError: a shard is missing or lies on a server, or a pattern fits no file.
    """
    shards = []
    for url in urls.split("::"):
        if "://" in url or url.startswith(("pipe:", "file:")):
            raise DataError(
                f"{url!r} is not a path. Shards are read from a file system: download them, or mount the storage, and "
                "write their path"
            )
        for pattern in expand_braces(url):
            if os.path.isdir(pattern):
                raise DataError(f"{pattern} is a folder; for all its shards write {os.path.join(pattern, '*.tar')}")
            found = [pattern]
            if glob.has_magic(pattern) and not os.path.exists(pattern):
                found = sorted(glob.glob(pattern, recursive=True))
                if not found:
                    raise DataError(f"no shard fits {pattern}")
            shards += found
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        examples = ", ".join(missing[:3])
        raise DataError(f"{len(missing)} of {len(shards)} shards are missing: {examples}{', ...' * (len(missing) > 3)}")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """a{08..10}b becomes a08b, a09b, a10b; a{x,y}b becomes axb, ayb; with several pairs, the last runs fastest.

    Raises:
        DataError: braces that hold neither.
    """
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    span = _RANGE.fullmatch(braces[1])
    if span:
        first, last = span.groups()
        values = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        values = braces[1].split(",")
    if not values or values == [braces[1]]:
        raise DataError(f"{pattern!r}: cannot read {braces[0]!r}; write a range from low to high such as {{000..146}}")
    ends = expand_braces(pattern[braces.end() :])
    return [f"{pattern[: braces.start()]}{value}{end}" for value in values for end in ends]


def _check_extension(key: str, value: str) -> str:
    """The extension in lower case, without a dot before it."""
    if "/" in value:
        raise DataError(f"{key}={value!r} is not an extension such as 'jpg' or 'cls'")
    return value.lower().removeprefix(".")
