"""Pictures of the task as training goes on: the same few images each time, with their reconstructions."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.distributed import is_main_process
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch
from dinov2_eq.types import CollatedBatch, ViewBatch

NUM_IMAGES = 6


class SampleWriter:
    """Writes `samples/step_<step>.npz`: views, targets and reconstructions of one fixed batch, in uint8."""

    def __init__(
        self,
        folder: Path,
        batch: CollatedBatch,
        make_views: Callable[[CollatedBatch], ViewBatch],
        components: Sequence[str],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        """
        Args:
            make_views: makes targets also for the control, which does not rebuild them.
            components: names of the P parameters in theta; none where the task is off.
        """
        self.folder = folder
        self.mean, self.std = (torch.tensor(list(value))[:, None, None] for value in (mean, std))
        batch = _first(batch, NUM_IMAGES)
        self.views = make_views(batch)
        still = make_views(batch._replace(theta=torch.zeros_like(batch.theta)))
        num_intermediates = len(self.views.intermediate_targets)
        self.arrays = {
            "anchor_view": self._pixels(self.views.global_crops[0]),
            "base_view": self._pixels(still.global_crops[1]),  # g with theta = 0
            "transformed_view": self._pixels(self.views.global_crops[1]),
            "intermediate_targets": self._pixels(self.views.intermediate_targets),
            "fractions": np.arange(1, num_intermediates + 1) / (num_intermediates + 1),
            "theta": batch.theta.cpu().numpy(),
            "components": np.array(components, dtype=np.str_),
        }

    @torch.no_grad()
    def write(self, arch: SSLMetaArch, step: int) -> None:
        """All processes take part, as each may hold a part of the networks; the main one writes."""
        arrays = dict(self.arrays)
        if "reconstruction" in arch.objectives:
            arch.eval()
            student = arch.student(self.views.global_crops)
            size = self.views.global_crops.shape[-2:]
            arrays["reconstructions"] = self._pixels(arch.objectives["reconstruction"].reconstruct(student, size))
            arch.train()
        if not is_main_process():
            return
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"step_{step:07d}.npz", **arrays)

    def _pixels(self, images: Tensor) -> np.ndarray:
        """normalised [..., 3, H, W] -> uint8 [..., H, W, 3]"""
        pixels = (images.float().cpu() * self.std + self.mean).clamp(0, 1) * 255
        return pixels.round().byte().movedim(-3, -1).numpy()


def _first(batch: CollatedBatch, number: int) -> CollatedBatch:
    """The first images of a batch, without local crops and masks."""
    return batch._replace(
        anchor_crops=batch.anchor_crops[:number],
        base_canvases=batch.base_canvases[:number],
        local_crops=batch.local_crops[:0, :number],
        photometric=type(batch.photometric)(*(values[:2, :number] for values in batch.photometric)),
        theta=batch.theta[:number],
        masks=torch.zeros_like(batch.masks[:, :number]),
    )
