"""Pictures of the task during training: the same few images each time, with the outputs of the objectives."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.augmentations import make_views
from dinov2_eq.data.loaders import to_device
from dinov2_eq.distributed import is_main_process
from dinov2_eq.equivariance.pairing import Pairing
from dinov2_eq.settings import CropsConfig
from dinov2_eq.train.step import Run
from dinov2_eq.types import GLOBAL, CollatedBatch, PathViews, Scene

NUM_IMAGES = 6


class SampleWriter:
    """Writes `samples/step_<step>.npz`: views, targets and reconstructions of one fixed batch, in uint8.

    Args:
        fractions: fractions of theta to show, also in a control run without reconstruction.
        path: extra views that the student encodes for one objective.
    """

    def __init__(
        self,
        folder: Path,
        batch: CollatedBatch,
        run: Run,
        crops: CropsConfig,
        pairing: Pairing,
        fractions: Sequence[float],
        path: PathViews | None = None,
    ) -> None:
        self.folder = folder
        self.run = run
        self.mean, self.std = (torch.tensor(list(value))[:, None, None] for value in (crops.mean, crops.std))
        batch = to_device(_first(batch, NUM_IMAGES), run.device)
        make = partial(make_views, crops=crops, pairing=pairing, targets=[*fractions, 1.0], path=path)
        self.views = make(batch)
        still = make(batch._replace(theta=torch.zeros_like(batch.theta)))
        self.arrays = {
            "anchor_view": self._pixels(self.views.groups[GLOBAL].images[0]),
            "base_view": self._pixels(still.targets[-1]),  # g with theta = 0
            "transformed_view": self._pixels(self.views.targets[-1]),
            "intermediate_targets": self._pixels(self.views.targets[:-1]),
            "fractions": np.array(fractions),
            "theta": batch.theta.cpu().numpy(),
            "components": np.array(pairing.components, dtype=np.str_),
        }

    @torch.no_grad()
    def write(self, step: int) -> None:
        """Writes the pictures of this step; all processes must call it, since the networks may be sharded."""
        arch, device, arrays = self.run.arch, self.run.device, dict(self.arrays)
        arch.eval()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.run.half_precision):
            scene = Scene(self.views, arch.student(self.views.groups), teacher=None, teacher_temp=1.0)
            for objective in arch.objectives.values():
                arrays |= {name: self._pixels(images) for name, images in objective.pictures(scene).items()}
        arch.train()
        if not is_main_process():
            return
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"step_{step:07d}.npz", **arrays)

    def _pixels(self, images: Tensor) -> np.ndarray:
        """Turns normalised images [..., 3, H, W] into uint8 [..., H, W, 3]."""
        pixels = (images.float().cpu() * self.std + self.mean).clamp(0, 1) * 255
        return pixels.round().byte().movedim(-3, -1).numpy()


def _first(batch: CollatedBatch, number: int) -> CollatedBatch:
    """Returns the first images of a batch, without local crops and masks."""
    return batch._replace(
        anchor_crops=batch.anchor_crops[:number],
        base_canvases=batch.base_canvases[:number],
        local_crops=batch.local_crops[:0, :number],
        photometric=type(batch.photometric)(*(values[:2, :number] for values in batch.photometric)),
        theta=batch.theta[:number],
        known=batch.known[:number],
        path_rows=torch.arange(len(batch.theta[:number])),
        masks=batch.masks[:, :number, :0],
        masked_patches=batch.masked_patches[:0],
    )
