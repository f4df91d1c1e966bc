"""Asked before hours of computing, not after."""

import tempfile
from pathlib import Path


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
