"""Files that are written whole or not at all, and folders that cannot be written: asked before hours of computing."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

TEMPORARY = ".writing"
DAY_S = 24 * 60 * 60
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def check_writable(folder: Path) -> None:
    """Makes the folder, and a file in it that goes away at once.

    Raises:
        OSError: either cannot be done.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error}); choose another --output-dir") from None


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Names the folder of a run, and what to do, when its disk is full or read-only.

    Raises:
        OSError: instead of that of a writer, which names no file, or of torch's RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in DISK_ERRORS:
            raise
        raise OSError(
            f"{folder} cannot be written any more: {cause.strerror}. Its checkpoints are intact: when this is mended, "
            "the same command goes on from the newest"
        ) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to: the file is `path` when the block ends; when it fails, `path` is as before.

    Every call has a name of its own, so that of two jobs which write the same file one wins and neither fails.
    """
    _remove_leftovers(path.parent)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}{TEMPORARY}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@cache  # a search for each of ten thousand files in a folder would take longer than to write them
def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left behind in the folder, a day later; each process looks once."""
    for leftover in folder.glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):
        with suppress(OSError):  # the other job may have ended meanwhile
            if time.time() - leftover.stat().st_mtime > DAY_S:
                leftover.unlink()


def replace_text(path: Path, text: str) -> None:
    """As `path.write_text(text)` in UTF-8, by `whole_file`; bytes of file names that are not UTF-8 become "\\udce9"."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def read_errors_named(path: Path) -> Iterator[None]:
    """Puts the name of the file into an OSError of the block: Python names files that it cannot open, no others."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The table (a JSON object) that a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or no table; names the file.
    """
    try:
        with read_errors_named(path):
            content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON, or it was cut off while it was written or copied ({error}); restore or remake it"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}, and no table {{...}}; restore or remake it")
    return content


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """For a block that takes the content of a file apart.

    Raises:
        ValueError: with the name of the file, where the content is not built as the block expects.
    """
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}); restore or remake it"
        ) from None


def file_sha256(path: Path) -> str:
    """Of the bytes of a file, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
