"""The output folder of a run."""

import json
import os
import time
from pathlib import Path

import torch
from torch import nn

from dinov2_eq.config.load import to_dict, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.distributed import is_main_process
from dinov2_eq.logging import check_writable


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(self, *, fresh: bool) -> None:
        """Makes the folder. `fresh` sets the checkpoints of an earlier run aside.

        Raises:
            OSError: the folder cannot be made or written.
        """
        if not is_main_process():
            return
        check_writable(self.path)
        checkpoints = self.path / "checkpoints"
        if fresh and checkpoints.exists():
            checkpoints.rename(self.path / f"checkpoints.replaced-{time.strftime('%Y%m%d-%H%M%S')}")

    def describe(self, config: Config, description: dict[str, str]) -> None:
        """Writes the resolved config, and code and machine of this start of the run."""
        if is_main_process():
            (self.path / "config.yaml").write_text(to_yaml(config))
            (self.path / "environment.json").write_text(json.dumps(description, indent=2) + "\n")

    def write_teacher(self, teacher: nn.Module, config: Config, step: int) -> Path:
        """Writes `eval/training_<step>/teacher_checkpoint.pth`, which carries its config."""
        path = self.path / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
        if is_main_process():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(".writing")
            weights = {name: tensor.cpu() for name, tensor in teacher.state_dict().items()}
            torch.save({"teacher": weights, "config": to_dict(config), "step": step}, temporary)
            os.replace(temporary, path)
        return path
