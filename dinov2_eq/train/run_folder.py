"""Files of a run's output folder that are neither checkpoints nor metrics."""

import json
import logging
import os
import time
from pathlib import Path

import torch
from torch import nn

from dinov2_eq.config.load import to_dict, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.distributed import is_main_process
from dinov2_eq.logging import check_writable, describe_run

CHECKPOINTS = "checkpoints"

logger = logging.getLogger(__name__)


def prepare(folder: Path, *, resume: bool) -> None:
    """Makes the folder; without `resume`, checkpoints of an earlier run there are set aside.

    Raises:
        OSError: the folder cannot be made or written.
    """
    if not is_main_process():
        return
    check_writable(folder)
    checkpoints = folder / CHECKPOINTS
    if not resume and checkpoints.exists():
        checkpoints.rename(folder / f"{CHECKPOINTS}.replaced-{time.strftime('%Y%m%d-%H%M%S')}")


def describe(folder: Path, config: Config) -> None:
    """Writes the resolved config, and code and machine of this start of the run."""
    if is_main_process():
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "environment.json").write_text(json.dumps(describe_run(), indent=2) + "\n")


def write_teacher(folder: Path, teacher: nn.Module, config: Config, step: int) -> None:
    """Writes `eval/training_<step>/teacher_checkpoint.pth`, which carries its config."""
    if not is_main_process():
        return
    path = folder / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".writing")
    weights = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
    torch.save({"teacher": weights, "config": to_dict(config), "step": step}, temporary)
    os.replace(temporary, path)
    logger.info("wrote %s", path)
