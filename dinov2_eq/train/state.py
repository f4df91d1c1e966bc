"""Content of a training checkpoint, from which a run resumes exactly."""

import logging
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.data.corrupt import CorruptCounter
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)


class TrainingState:
    """Networks, centres, optimizer and counters, in the same form for any number of processes.

    The position in the data, the schedules and all random numbers need no state: they follow from the step.
    """

    def __init__(
        self, arch: SSLMetaArch, optimizer: torch.optim.Optimizer, corrupt: CorruptCounter, global_batch_size: int
    ) -> None:
        """`global_batch_size`: images per step, which must not change, as it decides the position in the data."""
        self.arch = arch
        self.optimizer = optimizer
        self.corrupt = corrupt
        self.global_batch_size = global_batch_size

    def state_dict(self) -> dict[str, Any]:
        _complete(self.optimizer)
        return {
            "model": self.arch.state_dict(),
            "optimizer": get_optimizer_state_dict(self.arch, self.optimizer),
            "corrupt": self.corrupt.state_dict(),
            "global_batch_size": self.global_batch_size,
        }

    def load(self, checkpointer: Checkpointer, step: int) -> int:
        """Loads the checkpoint of `step`; returns the number of finished updates.

        Raises:
            ValueError: the checkpoint has another architecture or global batch size.
        """
        state = self.state_dict()
        checkpointer.load(step, state)
        before, now = state["global_batch_size"], self.global_batch_size
        if before != now:
            raise ValueError(
                f"The run began with {before} images per step and now has {now}: its position in the data "
                "would be lost. Choose train.batch_size_per_gpu x train.accumulation_steps x processes = "
                f"{before}, another --output-dir, or --no-resume"
            )
        self.arch.load_state_dict(state["model"])
        set_optimizer_state_dict(self.arch, self.optimizer, state["optimizer"])
        for group in self.optimizer.param_groups:  # loading restored the value of the run that saved it
            group["fused"] = self.optimizer.defaults["fused"]
        self.corrupt.load_state_dict(state["corrupt"])
        logger.info("resumed from %s", checkpointer.folder / str(step))
        return step


def _complete(optimizer: torch.optim.Optimizer) -> None:
    """Adds zero moments for parameters that never had a gradient, such as the mask token of a method without masks.

    Without them the checkpoint could not be loaded.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state.get(parameter):
                device = parameter.device if group["fused"] else "cpu"
                optimizer.state[parameter] = {
                    "step": torch.zeros((), device=device),
                    "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                    "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
                }
