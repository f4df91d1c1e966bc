"""Whether a folder can be written: asked before hours of computing, and explained when it ends on the way."""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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


def replace_text(path: Path, text: str) -> None:
    """As `path.write_text(text)`; when it fails, what the file held before is still there."""
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text)
    os.replace(temporary, path)
