import numpy as np
import pytest
import torch

from dinov2_eq.data.masking import BlockMasking, draw_blocks


@pytest.mark.parametrize(("probability", "num_crops"), [(0.5, 32), (0.5, 7), (0.3, 10), (1.0, 6), (0.0, 8)])
def test_exact_share_of_the_crops_is_masked(probability, num_crops):
    masking = BlockMasking((14, 14), (0.1, 0.5), probability)
    for step in range(5):
        masks = masking(num_crops, range(num_crops), 0, step)
        assert masks.shape == (num_crops, 196) and masks.dtype == torch.bool
        assert (masks.any(1)).sum() == int(num_crops * probability)


def test_visible_crops_leave_their_masks_to_the_others():
    masking = BlockMasking((14, 14), (0.1, 0.5), 0.5)
    for step in range(5):
        masked = masking(16, range(16), 0, step, visible=[1, 4, 9]).any(1)
        assert masked.sum() == 8 and not masked[[1, 4, 9]].any()
    masked = masking(16, range(16), 0, 0, visible=range(2, 16)).any(1)
    assert masked.nonzero().flatten().tolist() == [0, 1]  # all that may have one


def test_ratios_are_stratified_and_never_exceeded():
    masking = BlockMasking((14, 14), (0.1, 0.5), 0.5)
    edges = np.linspace(0.1, 0.5, 17)
    short = 0
    for step in range(10):
        counts = masking(32, range(32), 0, step).sum(1)
        counts = counts[counts > 0].sort().values.numpy()
        # In its bucket at most; one that stopped short can only be lower than its bucket.
        assert (counts <= np.floor(196 * edges[1:])).all()
        short += (counts < np.floor(196 * edges[:-1])).sum()
    assert short < 0.2 * 160


def test_about_nine_in_ten_masks_hit_their_target():
    hits = 0
    for seed in range(300):
        mask = np.zeros((14, 14), dtype=bool)
        target = 20 + seed % 79
        draw_blocks(mask, target, np.random.default_rng(seed))
        assert mask.sum() <= target
        hits += mask.sum() == target
    assert 0.84 < hits / 300 < 0.98  # dinov2: 91 %


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (2, 2), (3, 3), (4, 6), (37, 37)])
def test_any_grid(grid):
    masks = BlockMasking(grid, (0.1, 0.9), 1.0)(8, range(8), 0, 0)
    assert masks.shape == (8, grid[0] * grid[1])
    assert (masks.sum(1) <= 0.9 * grid[0] * grid[1]).all()


def test_masks_are_blocks():
    mask = np.zeros((14, 14), dtype=bool)
    draw_blocks(mask, 60, np.random.default_rng(0))
    neighbours = (mask[:-1] & mask[1:]).sum() + (mask[:, :-1] & mask[:, 1:]).sum()
    assert neighbours > 60  # about 36 if the same number of patches were scattered


def test_a_slot_has_its_mask_whoever_asks():
    masking = BlockMasking((8, 8), (0.1, 0.5), 0.5)
    every = masking(16, range(16), 3, 5)
    assert torch.equal(masking(16, [9, 2, 15], 3, 5), every[[9, 2, 15]])
    assert not torch.equal(masking(16, range(16), 3, 6), every)
    assert not torch.equal(masking(16, range(16), 4, 5), every)


def test_every_slot_is_masked_now_and_then():
    masking = BlockMasking((8, 8), (0.1, 0.5), 0.5)
    share = torch.stack([masking(8, range(8), 0, step).any(1) for step in range(200)]).float().mean(0)
    assert (share - 0.5).abs().max() < 0.15
