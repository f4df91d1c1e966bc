"""Which files of a folder are images, and what else looks like an image and is not read."""

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
# How many files of one ending are opened to see whether they are images, for how many endings, and in how many of the
# folders below a hidden one images are looked for.
NUM_PEEKS, MAX_ENDINGS, MAX_HIDDEN_FOLDERS = 10, 100, 100

Found = dict[str, tuple[int, str]]  # by the words for a kind of files: how many there are, and an example


class LeftOut:
    """Counts what looks like an image and is not read.

    Args:
        content: from the name of a file to its path or its content, to tell whether it is an image.
    """

    def __init__(self, content: Callable[[str], bytes | Path]) -> None:
        self._content = content
        self._found: Found = {}
        self._unknown: Found = {}  # by ending; the name of one that is an image, or ""

    def add(self, kind: str, example: str) -> None:
        count, first = self._found.get(kind, (0, example))
        self._found[kind] = count + 1, first

    def look_at(self, name: str) -> None:
        """Counts a file that is not read, if it seems to be an image or to hold some.

        The name decides; of those that say nothing, the first `NUM_PEEKS` of each ending are opened.
        """
        base = os.path.basename(name).lower()
        hidden = base.startswith(".")
        if base.startswith("._") or base.endswith(".crc"):  # what macOS and Hadoop put beside a file; no pixels in it
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

    def found(self) -> Found:
        images = [(count, image) for count, image in self._unknown.values() if image]
        unnamed = {"images without a usual ending": (sum(count for count, _ in images), images[0][1])} if images else {}
        return self._found | unnamed


def describe(found: Found, before: str = "") -> str:
    """A sentence part about what was left out, with `before` in front; "" where nothing was."""
    words = "; ".join(f"{kind} ({count}, such as {example})" for kind, (count, example) in found.items())
    return words and before + words


def warn_left_out(where: str, found: Found) -> None:
    if found:
        logger.warning("%s: left out are %s. Rename, convert or unpack what should be read.", where, describe(found))


@cache
def _image_extensions() -> set[str]:
    """Those that Pillow reads, even if nothing here does, and some of formats that it does not know."""
    known = Image.registered_extensions()
    return {extension for extension, kind in known.items() if kind in Image.OPEN} | EXTENSIONS_OF_OTHER_READERS


def looks_like_image(name: str) -> bool:
    extension = os.path.splitext("x" + name.lower())[1]  # of ".png", too
    return extension in EXTENSIONS or extension in _image_extensions()


def endings(name: str) -> list[str]:
    """All words after dots, in lower case: tar and gz of "a.tar.gz", zip and 001 of "a.zip.001"."""
    return name.lower().split(".")[1:]


def looks_like_archive(name: str) -> bool:
    return not ARCHIVES.isdisjoint(endings(name))


def check_folder(path: str) -> Path:
    if not os.path.isdir(path):
        raise DataError(f"there is no folder {path}")
    return Path(path)


def scan(folder: Path) -> list[os.DirEntry[str]]:
    """What lies directly in a folder, in the order of the names.

    Raises:
        DataError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot read the folder {folder}: {error.strerror}") from None


def list_folders(root: Path) -> list[str]:
    return [entry.name for entry in scan(root) if is_folder(entry) and not entry.name.startswith(".")]


def list_files(
    root: Path, left_out: LeftOut, start: str = "", skip: Collection[str] = (), needed: str | None = None
) -> Iterator[str]:
    """Paths of the regular files below `start`, relative to `root`.

    Links are followed; of several links to one folder, the first counts. Hidden folders and those of `skip` are not
    entered. Broken links and special files count as left out where their names are those of images or archives.

    Raises:
        DataError: a broken link or special file ends in `needed`: a part of the data, which must not go missing.
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
    """Paths of the images that `list_files` finds, sorted; hidden files are no images."""
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
    try:
        return entry.is_dir()
    except OSError:  # links in a circle
        return False


def is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False
