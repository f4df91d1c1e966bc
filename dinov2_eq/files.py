"""Atomic writes, checks that a folder is writable, and reads whose errors name the file."""

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
    """Creates the folder if needed, and a temporary file in it to check that it is writable.

    Raises:
        OSError: the folder cannot be created or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{folder} cannot be written ({error.strerror or error}); choose another --output-dir") from None


@contextmanager
def disk_errors_explained(folder: Path) -> Iterator[None]:
    """Replaces errors of a full or read-only disk by one that names the folder of the run and says what to do.

    Raises:
        OSError: in place of an OSError that names no file, or of torch's RuntimeError.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno not in DISK_ERRORS:
            raise
        raise OSError(
            f"{folder} cannot be written any more: {cause.strerror}. Its checkpoints are intact; once this is fixed, "
            "rerun the same command to resume from the newest"
        ) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, and renames it to `path` at the end; after an error `path` is unchanged.

    Every call uses its own temporary name: if two jobs write the same file, one wins and neither fails.
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


@cache  # listing a folder before each of ten thousand files would take longer than writing them
def _remove_leftovers(folder: Path) -> None:
    """Removes temporary files that killed processes left more than a day ago; looks once per process and folder."""
    for leftover in folder.glob(f"*.{'[0-9a-f]' * 8}{TEMPORARY}"):
        with suppress(OSError):  # another process may have removed it
            if time.time() - leftover.stat().st_mtime > DAY_S:
                leftover.unlink()


def replace_text(path: Path, text: str) -> None:
    """Writes text as UTF-8, completely or not at all; bytes of file names that are not UTF-8 appear as "\\udce9"."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


@contextmanager
def read_errors_named(path: Path) -> Iterator[None]:
    """Adds the file name to an OSError of the block; Python itself only names files that it cannot open."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def read_bytes(path: Path) -> bytes:
    """Reads a whole file.

    Raises:
        OSError: the file cannot be read; names it.
    """
    with read_errors_named(path):
        return path.read_bytes()


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        OSError: the file cannot be read; names it.
        ValueError: it is not JSON, or not an object; names the file.
    """
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not JSON, or it was cut off while it was written or copied ({error}); restore or recreate it"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {str(content)[:40]!r}, not a table {{...}}; restore or recreate it")
    return content


@contextmanager
def as_written(path: Path) -> Iterator[None]:
    """Turns errors from missing or malformed entries of a file into a ValueError that names the file."""
    try:
        yield
    except (AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} is not as this version writes it ({type(error).__name__}: {error}); restore or recreate it"
        ) from None


def check_types(values: Iterable[Any], kind: type | UnionType) -> None:
    """Raises TypeError if a value is not of the given type."""
    for value in values:
        if not isinstance(value, kind):
            raise TypeError(f"{str(value)[:40]!r} is of type {type(value).__name__}")


def file_sha256(path: Path) -> str:
    """Computes the SHA-256 of a file's bytes, as hexadecimal digits."""
    digest = hashlib.sha256()  # hashlib.file_digest needs Python 3.11
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
