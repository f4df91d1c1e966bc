"""Locates the images of a tar file with one scan, and keeps the result in a small index file."""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.tar_scan import TarImages, scan_tar
from dinov2_eq.files import whole_file

logger = logging.getLogger(__name__)

INDEX_VERSION = 2
INDEX_FOLDER = ".dinov2_eq"  # next to the tar files


def index_tar(path: str, image: str, label: str) -> TarImages:
    """Locates the images of a tar file, from its index if there is one.

    A file is an image if its name has a usual extension. The exception is a file such as 0001.seg.png next to
    0001.jpg, which belongs to that sample and is skipped; 0001.5.png, however, is an image. The label is in the file
    with the same name up to the last dot, or else up to the first dot. The index is written next to the tar file, or
    else to the user's cache folder, and is valid as long as size and modification time of the tar file stay the same.

    Args:
        image: everything after the first dot in the names of the images; "": any usual extension, see above.
        label: extension of the files that hold the label, a whole number.

    Raises:
        DataError: the file is missing, damaged, compressed, or has data after its end; it has no images, two for one
            sample, or a sparse one.
    """
    try:
        stat = os.stat(path)
        stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
        name = f"{os.path.basename(path)}.{image or 'any'}.{label}"
        for folder in _index_folders(path):
            images = _load(folder / name, stamp)
            if images is not None:
                return images
        images = scan_tar(path, image, label)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from None
    for folder in _index_folders(path):
        try:
            _save(folder / name, stamp, images)
            return images
        except OSError as error:
            reason = error.strerror
    _warn_once(os.path.dirname(path), reason)
    return images


@cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning("The index of the shards in %s cannot be kept, so each start scans them again: %s", folder, reason)


def _index_folders(path: str) -> Iterator[Path]:
    """Folders where the index of a tar file may be, in order of preference."""
    folder = os.path.dirname(os.path.realpath(path))
    yield Path(folder, INDEX_FOLDER)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return
    yield cache / "dinov2_eq" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _load(path: Path, stamp: list[int]) -> TarImages | None:
    """Loads what `_save` wrote; None if there is no index, or it is damaged or of another stamp."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, content = content[:8], content[8:]
    if checksum != _checksum(content):
        return None
    header, _, rows = content.partition(b"\n")
    try:
        saved_stamp, *others = json.loads(header)
    except (ValueError, TypeError):  # written by an earlier version
        return None
    if saved_stamp != stamp:
        return None
    return TarImages(np.frombuffer(rows, dtype="<i8").reshape(-1, 3), *others)


def _save(path: Path, stamp: list[int], images: TarImages) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, *others = images
    content = json.dumps([stamp, *others]).encode() + b"\n" + rows.astype("<i8").tobytes()
    with whole_file(path) as temporary:
        temporary.write_bytes(_checksum(content) + content)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(8, "little")
