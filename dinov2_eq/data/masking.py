"""Block masks for iBOT, drawn as in DINOv2 (BEiT's block-wise masking, arXiv 2106.08254, algorithm 1)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.seeding import Stream, numpy_generator

MIN_BLOCK_PATCHES = 4
MIN_ASPECT = 0.3
NUM_ATTEMPTS = 10


class BlockMasking:
    """Draws masks for the global crops of one step.

    Of all crops of the step, over all processes, exactly floor(`sample_probability` * number) get a mask, or all that
    may have one. Their ratios are stratified: the range `ratio_min_max` is cut into as many equal buckets as there are
    masks, and each mask draws its ratio from its own bucket. Random numbers are fixed by (seed, step, slot), where a
    slot is the place of a crop in the step, so a process only draws the masks of its own slots.

    Args:
        grid: (h, w) in patches.
        ratio_min_max: smallest and largest share of the patches that a mask hides.
        sample_probability: share of the crops that get a mask.
    """

    def __init__(self, grid: tuple[int, int], ratio_min_max: tuple[float, float], sample_probability: float) -> None:
        self.grid = grid
        self.ratio_min_max = ratio_min_max
        self.sample_probability = sample_probability

    def __call__(
        self, num_crops_total: int, slots: Sequence[int], seed: int, step: int, visible: Sequence[int] = ()
    ) -> Tensor:
        """Draws masks [len(slots), h * w] bool for the given slots out of 0 .. num_crops_total - 1.

        Args:
            visible: slots of crops that get no mask; the others get as many masks as if there were none of these.
        """
        maskable = np.setdiff1d(np.arange(num_crops_total), visible)
        num_masked = min(int(num_crops_total * self.sample_probability), len(maskable))
        bucket_of_slot = np.full(num_crops_total, num_masked)
        bucket_of_slot[maskable] = numpy_generator(Stream.MASK_ASSIGNMENT, seed, step).permutation(len(maskable))
        edges = np.linspace(*self.ratio_min_max, num_masked + 1)
        masks = np.zeros((len(slots), *self.grid), dtype=bool)
        for mask, slot in zip(masks, slots, strict=True):
            bucket = bucket_of_slot[slot]
            if bucket < num_masked:
                generator = numpy_generator(Stream.MASK, seed, step, slot)
                ratio = generator.uniform(edges[bucket], edges[bucket + 1])
                draw_blocks(mask, int(mask.size * ratio), generator)
        return torch.from_numpy(masks).flatten(1)


def ever_masks(grid: tuple[int, int], ratio_min_max: Sequence[float], num_masks: int, seed: int) -> bool:
    """Returns whether any of `num_masks` trial masks hides a patch."""
    masking = BlockMasking(grid, ratio_min_max, sample_probability=1.0)
    return bool(masking(num_masks, range(num_masks), seed, step=0).any())


def draw_blocks(mask: np.ndarray, target: int, generator: np.random.Generator) -> None:
    """Adds rectangles to `mask` [h, w] until `target` patches are masked.

    Never exceeds the target. About one mask in ten misses it by a few patches, because no rectangle fits any more.
    """
    height, width = mask.shape
    max_patches = (height // 2) * width
    num_masked = 0
    while num_masked < target:
        added = _add_block(mask, min(target - num_masked, max_patches), generator)
        if not added:
            break
        num_masked += added


def _add_block(mask: np.ndarray, max_new: int, generator: np.random.Generator) -> int:
    """Tries to mask one more rectangle; returns the number of patches it adds, at most `max_new`."""
    height, width = mask.shape
    for _ in range(NUM_ATTEMPTS):
        area = MIN_BLOCK_PATCHES + (max_new - MIN_BLOCK_PATCHES) * generator.random()
        aspect = math.exp(generator.uniform(math.log(MIN_ASPECT), -math.log(MIN_ASPECT)))
        block_height, block_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if block_height >= height or block_width >= width:
            continue
        top = generator.integers(0, height - block_height, endpoint=True)
        left = generator.integers(0, width - block_width, endpoint=True)
        block = mask[top : top + block_height, left : left + block_width]
        num_new = block.size - int(block.sum())
        if 0 < num_new <= max_new:
            block[:] = True
            return num_new
    return 0
