"""Results files."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinov2_eq.evaluation.encoder import find_checkpoint
from dinov2_eq.logging import check_writable


def results_folder(pretrained_weights: str | Path, output_dir: str | Path | None) -> Path:
    """`output_dir`, or where the weights are: the run folder, or the folder of the checkpoint.

    Raises:
        FileNotFoundError: there are no weights, so nothing will ever be written.
    """
    path = Path(pretrained_weights)
    find_checkpoint(path)
    if output_dir:
        return Path(output_dir)
    return path if path.is_dir() else path.parent


def write_results(path: Path, results: Mapping[str, Any]) -> Path:
    """Writes JSON that any parser reads, whole or not at all; makes the folder.

    Raises:
        OSError: the folder cannot be made or written.
        ValueError: the results hold NaN or infinity, which JSON has no word for.
    """
    text = json.dumps(results, indent=2, allow_nan=False) + "\n"
    check_writable(path.parent)
    temporary = path.with_name(f"{path.name}.writing")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path
