"""Lists the images of a folder, and counts files that look like images but are not read."""

import logging
import os
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache
from itertools import islice
from pathlib import Path

from PIL import Image

from dinov2_eq.data.datasets.base import DataError
from dinov2_eq.data.datasets.decode import is_image

logger = logging.getLogger(__name__)

EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".jp2", ".j2k", ".jpx", ".jpf"),
    *(".gif", ".tif", ".tiff", ".bmp", ".dib", ".ppm", ".pgm", ".pbm", ".pnm"),
)
EXTENSIONS_OF_OTHER_READERS = {".heic", ".heif", ".jxl", ".svg", ".exr", ".dcm"}
PARQUET = {"parquet", "parq", "pq"}
ARCHIVES = {"zip", "tar", "tgz", "tbz2", "txz", "gz", "bz2", "xz", "zst", "7z", "rar"} | PARQUET
BROKEN = "broken links and special files"
NUM_PEEKS = 10  # files of one extension that are opened to see whether they are images
MAX_ENDINGS = 100  # extensions for which this is done
MAX_HIDDEN_FOLDERS = 100  # folders below a hidden one that are searched for images

Counts = dict[str, tuple[int, str]]  # by a description of the kind of files: their number, and an example


class LeftOut:
    """Counts files that look like images but are not read.

    Args:
        content: returns the path or the bytes of a file with a given name, to check whether it is an image.
    """

    def __init__(self, content: Callable[[str], bytes | Path]) -> None:
        self._content = content
        self._counts: Counts = {}
        self._unknown: Counts = {}  # by extension; the example is the name of an image, or "" if none was opened yet

    def add(self, kind: str, example: str) -> None:
        """Counts a file of the given kind; the first one of each kind becomes the example."""
        count, first = self._counts.get(kind, (0, example))
        self._counts[kind] = count + 1, first

    def look_at(self, name: str) -> None:
        """Counts a file that is not read if it seems to be an image or to contain images.

        This is decided by its name. If the name says nothing, the first `NUM_PEEKS` files of each extension are opened.
        """
        base = os.path.basename(name).lower()
        hidden = base.startswith(".")
        if base.startswith("._") or base.endswith(".crc"):  # metadata that macOS and Hadoop write next to a file
            return
        if looks_like_image(base):
            self.add("hidden image files" if hidden else "image files of kinds that are not read here", name)
        elif looks_like_archive(base):
            self.add("archives", name)
        elif not hidden:
            self._peek(name, re.sub(r"\d+", "0", os.path.splitext(base)[1]))

    def _peek(self, name: str, ending: str) -> None:
        ending = ending if ending in self._unknown or len(self._unknown) < MAX_ENDINGS else ""
        count, image = self._unknown.get(ending, (0, ""))
        if not image and count < NUM_PEEKS and is_image(self._content(name)):
            image = name
        self._unknown[ending] = count + 1, image

    def by_kind(self) -> Counts:
        """What was counted so far."""
        images = [(count, image) for count, image in self._unknown.values() if image]
        unnamed = {"images without a usual ending": (sum(count for count, _ in images), images[0][1])} if images else {}
        return self._counts | unnamed


def describe(skipped: Counts, before: str = "") -> str:
    """Describes skipped files for a message, with `before` in front; "" if there are none."""
    words = "; ".join(f"{kind} ({count}, such as {example})" for kind, (count, example) in skipped.items())
    return words and before + words


def warn_left_out(where: str, skipped: Counts) -> None:
    """Logs one warning about skipped files, if there are any."""
    if skipped:
        logger.warning("%s: skipped: %s. Rename, convert or unpack what should be read.", where, describe(skipped))


@cache
def _image_extensions() -> set[str]:
    """Extensions of all formats that Pillow can read, and of some that it does not know."""
    known = Image.registered_extensions()
    return {extension for extension, kind in known.items() if kind in Image.OPEN} | EXTENSIONS_OF_OTHER_READERS


def looks_like_image(name: str) -> bool:
    """Whether the file name has the extension of an image, of a format that is read here or not."""
    extension = os.path.splitext("x" + name.lower())[1]  # with the "x", ".png" has an extension too
    return extension in EXTENSIONS or extension in _image_extensions()


def endings(name: str) -> list[str]:
    """All extensions in lower case: ["tar", "gz"] for "a.tar.gz", ["zip", "001"] for "a.zip.001"."""
    return name.lower().split(".")[1:]


def looks_like_archive(name: str) -> bool:
    """Whether one of the extensions is that of an archive or Parquet file."""
    return not ARCHIVES.isdisjoint(endings(name))


def check_folder(path: str) -> Path:
    """Returns the path of an existing folder; raises DataError if there is none."""
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}")
    return Path(path)


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """Lists the entries of a folder in the order of their names.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def list_folders(root: Path) -> list[str]:
    """Names of the folders in `root` that are not hidden, sorted."""
    return [entry.name for entry in scan(root) if is_folder(entry) and not entry.name.startswith(".")]


def list_files(
    root: Path, left_out: LeftOut, start: str = "", skip: Collection[str] = (), needed: str | None = None
) -> Iterator[str]:
    """Yields the paths of regular files below `start`, relative to `root`.

    Links are followed; if several lead to one folder, the first counts. Hidden folders and those in `skip` are not
    entered. Broken links and special files are counted as left out if they are named like images or archives.

    Raises:
        DataError: a broken link or special file ends in `needed`, so that part of the data would be missing.
    """
    visited, pending = set(), [start]
    while pending:
        folder = pending.pop()
        real = os.path.realpath(root / folder)
        if real in visited:
            continue
        visited.add(real)
        for entry in scan(root / folder):
            path = os.path.join(folder, entry.name)
            if is_file(entry):
                yield path
            elif not is_folder(entry):
                if needed is not None and entry.name.endswith(needed):
                    raise DataError(f"{root / path} is a broken link or not a regular file; restore or remove it")
                if looks_like_image(entry.name) or looks_like_archive(entry.name):
                    left_out.add(BROKEN, path)
            elif entry.name.startswith("."):
                if _holds_images(root / path):
                    left_out.add("hidden folders with images", path)
            elif path not in skip:
                pending.append(path)


def list_images(root: Path, left_out: LeftOut, start: str = "", skip: Collection[str] = ()) -> list[str]:
    """Sorted paths of the images among the files of `list_files`; hidden files do not count."""
    images = []
    for path in list_files(root, left_out, start, skip):
        name = os.path.basename(path)
        if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
            images.append(path)
        else:
            left_out.look_at(path)
    return sorted(images)


def _holds_images(folder: Path) -> bool:
    folders = islice(os.walk(folder), MAX_HIDDEN_FOLDERS)
    return any(looks_like_image(name) for _, _, files in folders for name in files)


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a circle of links
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a regular file or a link to one."""
    try:
        return entry.is_file()
    except OSError:
        return False
