"""What a training checkpoint holds, so that a resumed run equals one that never stopped."""

import logging
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.data.corrupt import CorruptCounter
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch

logger = logging.getLogger(__name__)


class TrainingState:
    """Networks, centres, optimizer, random state and counters.

    Order and augmentation of the images need no state: they follow from the step.
    """

    def __init__(
        self, arch: SSLMetaArch, optimizer: torch.optim.Optimizer, corrupt: CorruptCounter, device: torch.device
    ) -> None:
        self.arch = arch
        self.optimizer = optimizer
        self.corrupt = corrupt
        self.device = device

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.arch.state_dict(),
            "optimizer": get_optimizer_state_dict(self.arch, self.optimizer),
            "corrupt": self.corrupt.state_dict(),
            "random": {"cpu": torch.get_rng_state(), **self._device_random_state()},
        }

    def _device_random_state(self) -> dict[str, Tensor]:
        return {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}

    def save(self, checkpointer: Checkpointer, step: int) -> None:
        checkpointer.save(step, self._state())
        logger.info("saved %s", checkpointer.folder / str(step))

    def load(self, checkpointer: Checkpointer, step: int) -> int:
        """Fills everything from the checkpoint of `step`; returns the number of finished updates."""
        state = self._state()
        if "random.cuda" not in checkpointer.stored_names(step) and state["random"].pop("cuda", None) is not None:
            logger.warning("the run began on a CPU: on a GPU it goes on, but stochastic depth draws anew")
        checkpointer.load(step, state)
        self.arch.load_state_dict(state["model"])
        set_optimizer_state_dict(self.arch, self.optimizer, state["optimizer"])
        self.corrupt.load_state_dict(state["corrupt"])
        torch.set_rng_state(state["random"]["cpu"])
        if "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        logger.info("resumed from %s", checkpointer.folder / str(step))
        return step
