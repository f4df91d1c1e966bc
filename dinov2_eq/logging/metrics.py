"""Metrics of a run as JSON lines and TensorBoard events."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dinov2_eq.files import replace_text

FILE_NAME = "training_metrics.jsonl"

logger = logging.getLogger(__name__)


class MetricLogger:
    """Appends to `<folder>/training_metrics.jsonl` and to TensorBoard events beside it."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Opens the files and removes lines after `start_step`, which an interrupted run wrote after its checkpoint."""
        path = folder / FILE_NAME
        if path.exists():
            lines = _lines(path)
            kept = [line for line in lines if _step_of(line) <= start_step] if start_step else []
            replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events: SummaryWriter | None = None
        try:
            self._events = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        except UnicodeEncodeError:
            logger.warning(
                "no TensorBoard events, because it needs a path that is valid UTF-8; %s has all metrics", FILE_NAME
            )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line; `step` counts finished optimizer updates."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()


def first_value(folder: Path, name: str) -> list[float]:
    """The first value that was logged under `name`, as a list of one; [] if there is none."""
    path = folder / FILE_NAME
    lines = _lines(path) if path.exists() else []
    values = (json.loads(line) for line in lines if _step_of(line) < float("inf"))
    return [line[name] for line in values if name in line][:1]


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut off by a crash, or written by something else
        return float("inf")
