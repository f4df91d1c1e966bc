"""Where the images of a tar file lie: found by one scan, and kept in a small file for the next time."""

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
INDEX_FOLDER = ".dinov2_eq"  # beside the tar files


def index_tar(path: str, image: str, label: str) -> TarImages:
    """The images of a tar file.

    A file is an image if its name ends in a usual extension. The exception is 0001.seg.png beside 0001.jpg: it is a
    part of that sample, and left out; but 0001.5.png is an image. The label is in the file whose name goes like that of
    the image up to its last dot, or else up to its first dot. The result is kept beside the tar file, or else in the
    user's cache folder, and is used again as long as the tar file keeps its size and its time of change.

    Args:
        image: all after the first dot of the images' names; "": see above.
        label: extension of the files with the label, a whole number.

    Raises:
        DataError: the file is missing, damaged, compressed, or goes on after its end; it holds no images, two for one
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
    """Where the index of a tar file may be, the best place first."""
    folder = os.path.dirname(os.path.realpath(path))
    yield Path(folder, INDEX_FOLDER)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    except RuntimeError:  # a user without a home
        return
    yield cache / "dinov2_eq" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def _load(path: Path, stamp: list[int]) -> TarImages | None:
    """What `_save` wrote; None where there is nothing, or not for this stamp, or it is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, content = content[:8], content[8:]
    if checksum != _checksum(content):
        return None
    header, _, rows = content.partition(b"\n")
    try:
        found_stamp, *others = json.loads(header)
    except (ValueError, TypeError):  # of an earlier version
        return None
    if found_stamp != stamp:
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
