"""Where results files go, and writing them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2_eq.distributed import is_main_process
from dinov2_eq.files import check_writable, replace_text


def results_folder(encoder: str | Path, output_dir: str | Path | None) -> Path:
    """Returns `output_dir`, or if None the encoder's run folder or the folder of its weights.

    Raises:
        FileNotFoundError: the encoder is a path that does not exist.
        ValueError: the encoder is not a path, so `output_dir` is needed.
    """
    path = Path(encoder)
    has_scheme = ":" in str(encoder) and not path.exists()  # timm:NAME and the like
    if not has_scheme and not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a run folder, a teacher_checkpoint.pth below its eval/training_<step>/, "
            "or a source such as timm:NAME"
        )
    if output_dir:
        return Path(output_dir)
    if has_scheme:
        raise ValueError(f"--output-dir is missing: {encoder} is not a local folder that results could go to")
    return path if path.is_dir() else path.parent


def write_results(path: Path, results: Mapping[str, Any]) -> Path:
    """Writes strict JSON, complete or not at all, and creates the folder.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: the results hold NaN or infinity, which JSON does not allow.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    check_writable(path.parent)
    replace_text(path, text)
    return path


def publish(path: Path, results: Mapping[str, Any], table: str) -> None:
    """Writes the results and prints the table and the path, on the main process; raises as `write_results`."""
    if is_main_process():
        write_results(path, results)
        print(table)
        print(path)
