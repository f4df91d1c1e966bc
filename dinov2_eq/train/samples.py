"""Pictures of the task as training goes on: the same few images each time, with their reconstructions."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.augmentations import make_views
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch
from dinov2_eq.types import CollatedBatch, ViewBatch

NUM_IMAGES = 6


class SampleWriter:
    """Writes `samples/step_<step>.npz`: views, targets and reconstructions of one fixed batch, in uint8."""

    def __init__(
        self,
        folder: Path,
        batch: CollatedBatch,
        *,
        transform: Transform | None,
        num_intermediates: int,
        size: tuple[int, int],
        mean: list[float],
        std: list[float],
    ) -> None:
        """`num_intermediates` is K also in the control, whose targets are shown though nothing rebuilds them."""
        self.folder = folder
        self.size = size
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in (mean, std))
        batch = _first(batch, NUM_IMAGES)
        views = {"transform": transform, "num_intermediates": num_intermediates, "size": size, "mean": mean, "std": std}
        self.views: ViewBatch = make_views(batch, **views)
        still: ViewBatch = make_views(batch._replace(theta=torch.zeros_like(batch.theta)), **views)
        self.arrays = {
            "anchor_view": self._pixels(self.views.global_crops[0]),
            "base_view": self._pixels(still.global_crops[1]),  # g with theta = 0
            "transformed_view": self._pixels(self.views.global_crops[1]),
            "theta": batch.theta.cpu().numpy(),
        }
        if transform is not None:
            self.arrays["intermediate_targets"] = self._pixels(self.views.intermediate_targets)
            self.arrays["fractions"] = np.arange(1, num_intermediates + 1) / (num_intermediates + 1)

    @torch.no_grad()
    def write(self, arch: SSLMetaArch, step: int) -> None:
        arrays = dict(self.arrays)
        if "reconstruction" in arch.objectives:
            arch.eval()
            student = arch.student(self.views.global_crops)
            arrays["reconstructions"] = self._pixels(arch.objectives["reconstruction"].reconstruct(student, self.size))
            arch.train()
        self.folder.mkdir(exist_ok=True)
        np.savez_compressed(self.folder / f"step_{step:07d}.npz", **arrays)

    def _pixels(self, images: Tensor) -> np.ndarray:
        """normalised [..., 3, H, W] -> uint8 [..., H, W, 3]"""
        pixels = (images.float().cpu() * self.std + self.mean).clamp(0, 1) * 255
        return pixels.round().byte().movedim(-3, -1).numpy()


def _first(batch: CollatedBatch, number: int) -> CollatedBatch:
    """The first images of a batch, without masks."""
    return batch._replace(
        anchor_crops=batch.anchor_crops[:number],
        base_canvases=batch.base_canvases[:number],
        local_crops=batch.local_crops[:0, :number],
        photometric=type(batch.photometric)(*(values[:2, :number] for values in batch.photometric)),
        theta=batch.theta[:number],
        masks=torch.zeros_like(batch.masks[:, :number]),
    )
