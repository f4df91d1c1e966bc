"""Where the images of a tar file lie: found by one scan, and kept in a small file for the next time."""

import hashlib
import logging
import os
import tarfile
import uuid
import zlib
from functools import cache
from pathlib import Path

import numpy as np

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.folders import EXTENSIONS

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
INDEX_FOLDER = ".dinov2_eq"  # beside the tar files
NO_LABEL = -1
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


def index_tar(path: str, image: str, label: str) -> np.ndarray:
    """The images of a tar file, in its order: [num_images, 3] int64 with byte offset, size in bytes, label.

    Files that share their name up to its first dot, and their folder, belong together. The label is `NO_LABEL` where
    an image has none. The result is kept beside the tar file, or else in the user's cache folder, and is used again as
    long as the tar file keeps its size and its time of change.

    Args:
        image: extension of the images; "" for any usual one.
        label: extension of the files with the label, a whole number.

    Raises:
        DataError: the file is missing, damaged or compressed, holds no images, or holds a label that is no number.
    """
    try:
        stat = os.stat(path)
        stamp = [INDEX_VERSION, stat.st_size, stat.st_mtime_ns]
        folders = _index_folders(path)
        name = f"{os.path.basename(path)}.{image or 'any'}.{label}"
        for folder in folders:
            rows = _load(folder / name)
            if rows is not None and rows[0].tolist() == stamp:
                return rows[1:]
        rows = scan_tar(path, image, label)
    except OSError as error:
        raise DataError(f"cannot read the shard {path}: {error.strerror}") from None
    for folder in folders:
        try:
            _save(folder / name, np.concatenate([np.array([stamp]), rows]))
            return rows
        except OSError as error:
            reason = error.strerror
    _warn_once(os.path.dirname(path), reason)
    return rows


@cache
def _warn_once(folder: str, reason: str) -> None:
    logger.warning("The index of the shards in %s cannot be kept, so each start scans them again: %s", folder, reason)


def scan_tar(path: str, image: str, label: str) -> np.ndarray:
    """As `index_tar`, always from the tar file itself."""
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, tarfile.TarInfo] = {}
    extensions = set()
    for member in _list_files(path):
        folder, file_name = os.path.split(member.name)
        stem, _, extension = file_name.partition(".")
        if not stem or not extension:  # hidden files, and those that are no part of a sample
            continue
        extension = extension.lower()
        extensions.add(extension)
        key = os.path.join(folder, stem)
        if extension == image or (not image and f".{extension}" in EXTENSIONS):
            if key in images:
                raise DataError(
                    f"{path} has two images for the sample {key!r}, {images[key].name} and {member.name}. Choose one "
                    "by image=<extension>, or give each sample a name of its own."
                )
            images[key] = member
        elif extension == label:
            labels[key] = member
    if not images:
        wanted = f".{image}" if image else ", ".join(EXTENSIONS)
        present = ", ".join(sorted(extensions)[:8]) or "none"
        raise DataError(f"{path} holds no images (looked for {wanted}; its extensions are: {present})")
    with open(path, "rb") as file:
        numbers = {key: _read_label(file.fileno(), path, labels[key]) for key in images.keys() & labels.keys()}
    rows = [(member.offset_data, member.size, numbers.get(key, NO_LABEL)) for key, member in images.items()]
    return np.array(rows, dtype=np.int64)


def _list_files(path: str) -> list[tarfile.TarInfo]:
    """The regular files in a whole tar file."""
    with open(path, "rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                members = tar.getmembers()
                end = tar.offset
        except tarfile.TarError as error:
            file.seek(0)
            start = file.read(8)
            for magic, program in COMPRESSED.items():
                if start.startswith(magic):
                    raise DataError(
                        f"{path} is compressed, so that no image can be read without all before it. Unpack it with "
                        f"{program}; images hardly grow by that."
                    ) from None
            raise DataError(f"{path} is not a whole tar file: {error}. Write or copy it again.") from None
        # tarfile takes a header that it cannot read for the end of the archive; the end is a block of zeros.
        file.seek(end)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise DataError(
                f"{path} is truncated or damaged after {len(members)} files, at byte {end} of "
                f"{os.path.getsize(path)}. Write or copy it again."
            )
    return [member for member in members if member.isreg()]


def _read_label(descriptor: int, path: str, member: tarfile.TarInfo) -> int:
    content = os.pread(descriptor, member.size, member.offset_data)
    try:
        return int(np.int64(int(content)))
    except (ValueError, OverflowError):
        raise DataError(
            f"{path}/{member.name} holds {content[:40]!r}; a label is a whole number, as text. Name the extension that "
            "holds it by label=<extension>."
        ) from None


def _index_folders(path: str) -> list[Path]:
    """Where the index of a tar file may be, the best place first."""
    folder = os.path.dirname(os.path.realpath(path))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return [Path(folder, INDEX_FOLDER), cache / "dinov2_eq" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]]


def _load(path: Path) -> np.ndarray | None:
    """The rows of an index file, the stamp first; None where it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, rows = content[:8], content[8:]
    if len(rows) % 24 or not rows or checksum != _checksum(rows):
        return None
    return np.frombuffer(rows, dtype="<i8").reshape(-1, 3)


def _save(path: Path, rows: np.ndarray) -> None:
    """Written aside and renamed, because several processes may do so at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = rows.astype("<i8").tobytes()
    aside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    try:
        aside.write_bytes(_checksum(content) + content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(8, "little")
