"""Files that are written whole or not at all, and folders that cannot be written: asked before hours of computing."""

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import UnionType
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


@cache  # looking before each of ten thousand files in a folder would take longer than writing them
def _remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left in the folder more than a day ago; each process looks once."""
    for leftover in folder.glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):
        with suppress(OSError):  # the other job may have ended meanwhile
            if time.time() - leftover.stat().st_mtime > DAY_S:
                leftover.unlink()


def replace_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, whole or not at all; bytes of file names that are not UTF-8 appear as "\\udce9"."""
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


def read_bytes(path: Path) -> bytes:
    """What the file holds.

    Raises:
        OSError: it cannot be read; names it.
    """
    with read_errors_named(path):
        return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """The table (a JSON object) that a file holds.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not JSON, or not a table; names the file.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON, or it was cut off while it was written or copied ({error}); restore or remake it"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}, not a table {{...}}; restore or remake it")
    return content


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turns the errors of a block that takes a file's content apart into a ValueError that names the file."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}); restore or remake it"
        ) from None


def check_types(values: Iterable[Any], kind: type | UnionType) -> None:
    """Raises TypeError where a value is of another kind."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:40]!r} is of type {type(value).__name__}")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
