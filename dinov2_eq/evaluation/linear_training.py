"""Training of a grid of linear heads that resumes after an interruption."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.distributed import from_main_process, is_main_process
from dinov2_eq.distributed.signals import StoppedBySignal, StopRequest
from dinov2_eq.files import whole_file
from dinov2_eq.models.weight_files import read_weights
from dinov2_eq.probes.linear import GridTraining

RUNNING_CHECKPOINT = "running_checkpoint_linear_eval.pth"
KEPT_CHECKPOINT = "checkpoint_linear_eval_{step}.pth"

logger = logging.getLogger(__name__)


class GridCheckpoints:
    """Checkpoints of heads, optimizer and step in a folder, with the settings that they belong to.

    Args:
        settings: by name; must match those of a checkpoint to use its heads.
        schedule: by name; must also match to resume its training.
    """

    def __init__(
        self, folder: Path, training: GridTraining, settings: Mapping[str, Any], schedule: Mapping[str, Any]
    ) -> None:
        self.folder = folder
        self.training = training
        # Tuples become lists, as they would in the file.
        self.settings, self.schedule = (json.loads(json.dumps(values)) for values in (settings, schedule))
        self.history: list[dict[str, Any]] = []  # scores so far

    def save(self, name: str) -> None:
        """Writes a checkpoint on the main process, complete or not at all."""
        if is_main_process():
            state = {
                "training": self.training.state_dict(),
                "settings": self.settings,
                "schedule": self.schedule,
                "history": self.history,
            }
            # An open file, not a path: torch stores the path's name, and equal states would differ in bytes.
            with whole_file(self.folder / name) as temporary, temporary.open("wb") as file:
                torch.save(state, file)

    def resume(self) -> None:
        """Loads the running checkpoint, if any; ignores one of a finished evaluation with other settings.

        Raises:
            ValueError: the checkpoint is damaged, or of an interrupted evaluation with other settings.
        """
        path = self.folder / RUNNING_CHECKPOINT
        if not from_main_process(path.exists):
            return
        try:
            found = _read_saved(path)
        except ValueError as error:
            raise ValueError(f"{error}, or --no-resume to start over") from None
        changes = _changes(found["settings"] | found["schedule"], self.settings | self.schedule)
        if changes and found["training"]["step"] == found["training"]["num_steps"]:
            logger.info(
                "%s is from a finished evaluation with other settings and will be replaced: %s", path, changes[0]
            )
            return
        if changes:
            raise ValueError(
                f"{path} belongs to another evaluation, which was interrupted: {changes[0]}. Choose another "
                "--output-dir, or --no-resume to start over"
            )
        self.training.load_state_dict(found["training"])
        self.history = found["history"]
        logger.info("resuming after step %d of %d, from %s", self.training.step, self.training.num_steps, path)

    def load_trained(self, path: Path) -> None:
        """Loads heads that an earlier evaluation trained, with any schedule, to score them as they are.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is damaged, no checkpoint of this program, or has other settings.
        """
        found = _read_saved(path)
        if changes := _changes(found["settings"], self.settings):
            raise ValueError(
                f"The heads in {path} belong to another evaluation: {changes[0]}. Restore it, or give other heads"
            )
        self.training.load_heads(found["training"])
        self.schedule, self.history = found["schedule"], found["history"]
        logger.info("heads of %s, after step %d of %d", path, self.training.step, self.training.num_steps)


def _read_saved(path: Path) -> dict[str, Any]:
    """Reads a file of `GridCheckpoints.save` on the main process, and returns its content in every process.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or no checkpoint of this program.
    """

    def read() -> dict[str, Any]:
        found = read_weights(path)
        if set(found) != {"training", "settings", "schedule", "history"}:
            raise ValueError(
                f"{path} is not a {RUNNING_CHECKPOINT} or {KEPT_CHECKPOINT.format(step='<step>')} of this "
                "version of the program; give one"
            )
        return found

    return from_main_process(read)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Describes each setting that changed."""
    return [
        f"{name} was {before.get(name)!r} and is now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]


def train_grid(
    batches: Iterable[tuple[Tensor, Tensor]],
    checkpoints: GridCheckpoints,
    score: Callable[[], dict[str, Any]],
    *,
    score_period: int,
    epoch_length: int,
    keep_every_epochs: int,
    device: torch.device,
) -> None:
    """Trains to the last step and writes a running checkpoint after each epoch.

    Args:
        batches: features and labels on `device`, from the next step on; see `GridTraining.update`.
        score: returns an entry for the history; called every `score_period` steps and after the last.
        epoch_length: in steps.
        keep_every_epochs: epochs between checkpoints that are kept permanently.

    Raises:
        StoppedBySignal: SIGTERM, SIGUSR2 or SIGHUP reached a process; a checkpoint of this step is written.
    """
    training = checkpoints.training
    with StopRequest() as stop:
        for features, labels in islice(batches, training.num_steps - training.step):
            training.update(features, labels)
            done, last = training.step, training.step == training.num_steps
            if done % score_period == 0 or last:
                checkpoints.history.append({"iteration": done, **score()})
            signum = stop.agreed(device)
            if done % epoch_length == 0 or last or signum:
                checkpoints.save(RUNNING_CHECKPOINT)
            if done % (epoch_length * keep_every_epochs) == 0:
                checkpoints.save(KEPT_CHECKPOINT.format(step=done))
            if signum and not last:
                raise StoppedBySignal(signum, done)
