"""Samples to a batch, with the masks."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.types import CollatedBatch, PhotometricParams, Sample


class Collate:
    """Stacks samples along the batch axis, behind the crop axis, and draws the masks of their global crops.

    A sample's masks depend on (seed, position) and the global batch size: in its step, sample s of S has slot s for the
    anchor view and slot S + s for the other global crop.
    """

    def __init__(self, masking: BlockMasking, seed: int, global_batch_size: int) -> None:
        self.masking = masking
        self.seed = seed
        self.global_batch_size = global_batch_size

    def __call__(self, samples: Sequence[Sample]) -> CollatedBatch:
        photometric = zip(*(sample.photometric for sample in samples), strict=True)
        return CollatedBatch(
            step_position=samples[0].position,
            anchor_crops=torch.stack([sample.anchor_crop for sample in samples]),
            base_canvases=torch.stack([sample.base_canvas for sample in samples]),
            local_crops=torch.stack([sample.local_crops for sample in samples], dim=1),
            photometric=PhotometricParams(*(torch.stack(values, dim=1) for values in photometric)),
            theta=torch.stack([sample.theta for sample in samples]),
            masks=self._draw_masks([sample.position for sample in samples]),
            skipped=tuple(image for sample in samples for image in sample.skipped),
        )

    def _draw_masks(self, positions: Sequence[int]) -> Tensor:
        """[2, B, N] bool"""
        masks = []
        for step, group in groupby(positions, key=lambda position: position // self.global_batch_size):
            slots = [position % self.global_batch_size for position in group]
            slots += [self.global_batch_size + slot for slot in slots]
            drawn = self.masking(2 * self.global_batch_size, slots, self.seed, step)
            masks.append(drawn.unflatten(0, (2, -1)))
        return torch.cat(masks, dim=1)
