"""Datasets of images in tar files, packed as for WebDataset and read in random order."""

import glob
import logging
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.decode import EncodedImages
from dinov2_eq.data.datasets.listing import Counts, LeftOut, check_folder, describe, list_files, warn_left_out
from dinov2_eq.data.datasets.tar_index import index_tar
from dinov2_eq.data.datasets.tar_scan import NO_LABEL, TarImages

logger = logging.getLogger(__name__)

INDEX_THREADS = 16  # more than cores, because they mostly wait for the file system
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class WebDataset(EncodedImages):
    """Images of uncompressed tar files on a file system.

    Args:
        urls: a path, a glob pattern, or paths with ranges such as train-{000000..000146}.tar; several joined by `::`.
        image: everything after the first dot in the names of the images, such as `left.png`; by default any file with
            a usual extension is an image.
        label: extension of the files that hold the label, a whole number.

    A read only takes the bytes of its image, so shuffling all images is as fast as with separate files.
    """

    labels_hint = (
        "Pack a file with a whole number next to each image, 0001.cls beside 0001.jpg, or give its extension: "
        "WebDataset:urls=...:label=..."
    )

    def __init__(self, urls: str, image: str = "", label: str = "cls") -> None:
        self._open(urls, list_shards(urls), _check_extension("image", image), _check_extension("label", label))

    def _open(self, where: str, shards: list[str], image: str, label: str) -> None:
        self._shards = shards
        logger.info("reading the index of %d tar files; those without an index are scanned", len(shards))
        with ThreadPoolExecutor(INDEX_THREADS) as pool:
            tables = list(pool.map(lambda shard: index_tar(shard, image, label), shards))
        self._ends = np.cumsum([len(table.rows) for table in tables])  # first image after each shard
        rows = np.concatenate([table.rows for table in tables])
        self._places = rows[:, :2]  # [num_images, 2]: byte offset, size
        self._labels = rows[:, 2]
        by_shard = list(zip(shards, tables, strict=True))
        self._bad_label = next((f"{shard}/{table.bad_label}" for shard, table in by_shard if table.bad_label), "")
        _warn_of_others(where, by_shard)

    def read_labels(self) -> tuple[np.ndarray | None, list[str] | None]:
        if self._bad_label:
            raise DataError(
                f"{self._bad_label}; a label must be a whole number, as text. Give the extension of the label files "
                "with label=<extension>."
            )
        return (self._labels if (self._labels != NO_LABEL).any() else None), None

    def __len__(self) -> int:
        return len(self._places)

    def name(self, index: int) -> str:
        """The name as shard.tar/file from the tar header: at most 100 characters, maybe with "?" for non-ASCII ones."""
        shard, offset = self._shard(index), int(self._places[index, 0])
        try:
            header = self._read_bytes(index, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return f"{shard}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'surrogateescape').name}"
        except (OSError, tarfile.TarError):
            return f"{shard}, image at byte {offset}"

    def content(self, index: int) -> bytes:
        offset, size = self._places[index].tolist()
        content = self._read_bytes(index, offset, size)
        if len(content) < size:
            raise EOFError("the shard has become shorter since it was indexed")
        return content

    def _shard(self, index: int) -> str:
        return self._shards[int(np.searchsorted(self._ends, index, side="right"))]

    def _read_bytes(self, index: int, offset: int, size: int) -> bytes:
        with open(self._shard(index), "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)


class ClassTars(WebDataset):
    """Images of one uncompressed tar file per class in `root`, as in ImageNet-22k; labels are ranks of file names."""

    def __init__(self, root: str, extra: str = "") -> None:
        folder, shards = check_folder(root), []
        left_out = LeftOut(folder.joinpath)
        for name in list_files(folder, left_out, needed=".tar"):
            if name.endswith(".tar") and not name.startswith(".") and "/" not in name:
                shards.append(name)
            else:
                left_out.look_at(name)
        if not shards:
            others = describe(left_out.by_kind(), "; skipped: ")
            raise DataError(f"{root} holds no *.tar; give the folder with one tar file per class{others}")
        ignored = f"; extra={extra} is not needed" if extra else ""
        logger.info("ImageNet22k: reading %s/*.tar like WebDataset, with a class for each tar file%s", root, ignored)
        warn_left_out(root, left_out.by_kind())
        self._open(root, [str(folder / name) for name in sorted(shards)], image="", label="cls")

    def read_labels(self) -> tuple[np.ndarray, list[str]]:
        sizes = np.diff(self._ends, prepend=0)
        return np.repeat(np.arange(len(sizes)), sizes), [Path(shard).stem for shard in self._shards]


def _warn_of_others(where: str, tables: list[tuple[str, TarImages]]) -> None:
    """Warns about skipped files in all tar files together, and about samples with several images."""
    left_out: Counts = {}
    for shard, table in tables:
        for kind, (count, example) in table.left_out.items():
            before, first = left_out.get(kind, (0, f"{shard}/{example}"))
            left_out[kind] = before + count, first
    warn_left_out(where, left_out)
    shared = [(f"{shard}/{table.shared[1]}", table.shared[0]) for shard, table in tables if table.shared[0]]
    if shared:
        (example, _), number = shared[0], sum(count for _, count in shared)
        logger.warning(
            "%s: %d images share their sample with other images, such as %s, and all of them are read; "
            "image=%s reads one of each sample",
            *(where, number, example, os.path.basename(example).partition(".")[2]),
        )


def list_shards(urls: str) -> list[str]:
    """Expands `urls` to the paths of tar files, in order.

    Raises:
        DataError: a shard is missing or on a server, or a pattern matches no file.
    """
    shards = []
    for url in urls.split("::"):
        if "://" in url or url.startswith(("pipe:", "file:")):
            raise DataError(
                f"{url!r} is not a path. Shards are read from a file system: download them or mount the storage, and "
                "give their path"
            )
        for pattern in expand_braces(url):
            if os.path.isdir(pattern):
                raise DataError(f"{pattern} is a folder; for all its shards write {os.path.join(pattern, '*.tar')}")
            matches = [pattern]
            if glob.has_magic(pattern) and not os.path.exists(pattern):
                matches = sorted(glob.glob(pattern, recursive=True))
                if not matches:
                    raise DataError(f"no shard matches {pattern}")
            shards += matches
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        examples = ", ".join(missing[:3])
        raise DataError(f"{len(missing)} of {len(shards)} shards are missing: {examples}{', ...' * (len(missing) > 3)}")
    return shards


def expand_braces(pattern: str) -> list[str]:
    """Expands braces: a{08..10}b to a08b, a09b, a10b, and a{x,y}b to axb, ayb; of several pairs, the last runs fastest.

    Raises:
        DataError: the braces contain neither a range from low to high nor a list.
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
    """The extension in lower case, without a leading dot."""
    if "/" in value:
        raise DataError(f"{key}={value!r} is not an extension such as 'jpg' or 'cls'")
    return value.lower().removeprefix(".")
