"""Metrics of a run as JSON lines and TensorBoard events."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dinov2_eq.files import replace_text

FILE_NAME = "training_metrics.jsonl"


class MetricLogger:
    """Appends to `<folder>/training_metrics.jsonl` and to TensorBoard events beside it."""

    def __init__(self, folder: Path, start_step: int) -> None:
        """Drops lines beyond `start_step`, left by a run that was interrupted after its last checkpoint."""
        path = folder / FILE_NAME
        if path.exists():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= start_step] if start_step else []
            replace_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", buffering=1)
        self._events = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """`step` counts finished optimizer updates."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._file.close()
        self._events.close()


def first_value(folder: Path, name: str) -> list[float]:
    """[the first value that was logged under `name`], or [] where there is none."""
    path = folder / FILE_NAME
    lines = path.read_text().splitlines() if path.exists() else []
    values = (json.loads(line) for line in lines if _step_of(line) < float("inf"))
    return [line[name] for line in values if name in line][:1]


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut off by a crash
        return float("inf")
