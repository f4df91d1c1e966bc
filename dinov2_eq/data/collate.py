"""Samples to a batch, with the masks."""

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.types import CollatedBatch, PathViews, PhotometricParams, Sample


class Collate:
    """Stacks samples along the batch axis, behind the view axis, and draws the masks of their global crops.

    A sample's masks depend on (seed, position) and the global batch size: in its step, sample s of S has slot s for the
    anchor view and slot S + s for the other global crop.

    Args:
        masking: None: no masks.
        path: views for one objective alone; their images are spread evenly over the positions. None: there are none.
    """

    def __init__(
        self, masking: BlockMasking | None, seed: int, global_batch_size: int, path: PathViews | None = None
    ) -> None:
        self.masking = masking
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.path = path

    def __call__(self, samples: Sequence[Sample]) -> CollatedBatch:
        photometric = zip(*(sample.photometric for sample in samples), strict=True)
        positions = [sample.position for sample in samples]
        masks = self._draw_masks(positions)
        return CollatedBatch(
            anchor_crops=torch.stack([sample.anchor_crop for sample in samples]),
            base_canvases=torch.stack([sample.base_canvas for sample in samples]),
            local_crops=torch.stack([sample.local_crops for sample in samples], dim=1),
            photometric=PhotometricParams(*(torch.stack(values, dim=1) for values in photometric)),
            theta=torch.stack([sample.drawn.theta for sample in samples]),
            known=torch.tensor([sample.drawn.known for sample in samples]),
            path_rows=torch.tensor([row for row, position in enumerate(positions) if self._has_path(position)]).long(),
            masks=masks,
            masked_patches=masks.flatten().nonzero().flatten(),
            skipped=tuple(image for sample in samples for image in sample.skipped),
        )

    def _has_path(self, position: int) -> bool:
        share = self.path.share if self.path else 0.0
        return int((position + 1) * share) > int(position * share)

    def _draw_masks(self, positions: Sequence[int]) -> Tensor:
        """Draws masks [2, B, N] bool; N = 0 without masking."""
        if self.masking is None:
            return torch.zeros(2, len(positions), 0, dtype=torch.bool)
        masks, size = [], self.global_batch_size
        reads_base = self.path is not None and self.path.with_base
        for step, group in groupby(positions, key=lambda position: position // size):
            slots = [position % size for position in group]
            slots += [size + slot for slot in slots]
            visible = [size + slot for slot in range(size) if self._has_path(step * size + slot)] if reads_base else []
            drawn = self.masking(2 * size, slots, self.seed, step, visible)
            masks.append(drawn.unflatten(0, (2, -1)))
        return torch.cat(masks, dim=1)
