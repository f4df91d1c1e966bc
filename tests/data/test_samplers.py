from itertools import islice

import numpy as np
import pytest
import torch

from dinov2_eq.data import samplers
from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.samplers import WINDOW_CHUNKS, WINDOW_IMAGES, StreamSampler, draw_order


def take(count, **changes):
    arguments = {"num_images": 10, "seed": 0, "local_batch_size": 4, "rank": 0, "world_size": 1, **changes}
    return list(islice(StreamSampler(**arguments), count))


def test_each_pass_deals_every_image_once():
    indices = [index for _, index in take(40)]
    passes = [indices[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(dealt) == list(range(10)) for dealt in passes)
    assert len({tuple(dealt) for dealt in passes}) == 4
    assert passes[0] != [index for _, index in take(10, seed=1)]


@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 12), (2, 6), (3, 4), (3, 2), (2, 1)])
def test_world_size_does_not_change_the_stream(world_size, local_batch_size):
    ranks = [
        take(48 // world_size, rank=rank, world_size=world_size, local_batch_size=local_batch_size)
        for rank in range(world_size)
    ]
    merged = []
    for start in range(0, 48 // world_size, local_batch_size):
        for dealt in ranks:
            merged += dealt[start : start + local_batch_size]
    assert merged == take(48)
    assert [position for position, _ in merged] == list(range(48))


def test_resume_goes_on_where_it_stopped():
    assert take(16, start_position=24) == take(40)[24:]
    first = take(8, rank=1, world_size=2, start_position=16)
    assert first == take(16, rank=1, world_size=2)[8:]


def test_a_batch_may_be_larger_than_the_dataset():
    indices = [index for _, index in take(9, num_images=3, local_batch_size=9)]
    assert all(sorted(indices[start : start + 3]) == [0, 1, 2] for start in (0, 3, 6))
    assert [index for _, index in take(5, num_images=1)] == [0] * 5


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="empty"):
        StreamSampler(0, 0, 4, 0, 1)


# chunks


def order_of(num_images, chunk_ends, seed=0):
    return draw_order(num_images, chunk_ends, torch.Generator().manual_seed(seed))


def test_data_without_chunks_or_of_less_than_two_windows_are_shuffled_as_a_whole():
    expected = torch.randperm(1000, generator=torch.Generator().manual_seed(3))
    assert torch.equal(order_of(1000, None, seed=3), expected)
    assert torch.equal(order_of(1000, np.arange(10, 1001, 10), seed=3), expected)
    few_chunks = np.array([500, 2 * WINDOW_IMAGES])
    assert torch.equal(
        order_of(2 * WINDOW_IMAGES, few_chunks, seed=3),
        torch.randperm(2 * WINDOW_IMAGES, generator=torch.Generator().manual_seed(3)),
    )


def test_windows_keep_chunks_together_and_mix_them():
    sizes = np.random.default_rng(0).integers(0, 2000, 400)  # some are empty
    ends = sizes.cumsum()
    num_images = int(ends[-1])
    num_windows = num_images // WINDOW_IMAGES
    assert num_windows >= 5
    order = order_of(num_images, ends).numpy()
    assert (np.sort(order) == np.arange(num_images)).all()
    chunks = np.searchsorted(ends, order, side="right")

    # Every chunk lies within one window, and windows have about as many chunks each.
    span = np.array([np.ptp(np.flatnonzero(chunks == chunk)) for chunk in np.flatnonzero(sizes)])
    assert span.max() < 1.3 * num_images / num_windows
    # Inside, an image's place tells nothing about its chunk: neighbours share one as seldom as chance has it.
    middle = chunks[WINDOW_IMAGES // 4 : WINDOW_IMAGES // 2]  # inside the first window
    assert len(set(middle)) > 3 * WINDOW_CHUNKS
    shares = np.bincount(middle) / len(middle)
    assert (middle[1:] == middle[:-1]).mean() == pytest.approx((shares**2).sum(), rel=0.15)
    batches = middle[: len(middle) // 512 * 512].reshape(-1, 512)
    assert min(len(set(batch)) for batch in batches) > 0.75 * len(set(middle))
    # The windows themselves are drawn anew in each pass, from anywhere in the data.
    other = np.searchsorted(ends, order_of(num_images, ends, seed=1).numpy(), side="right")
    assert abs(np.corrcoef(order, np.arange(num_images))[0, 1]) < 0.15
    assert set(other[: WINDOW_IMAGES // 2]) != set(chunks[: WINDOW_IMAGES // 2])


def test_chunks_change_neither_passes_nor_world_size_nor_resume(monkeypatch):
    monkeypatch.setattr(samplers, "WINDOW_CHUNKS", 2)
    monkeypatch.setattr(samplers, "WINDOW_IMAGES", 8)
    chunks = {"num_images": 48, "chunk_ends": np.arange(3, 49, 3)}
    whole = take(96, **chunks, local_batch_size=12)
    for first in (0, 48):
        assert sorted(index for _, index in whole[first : first + 48]) == list(range(48))
    assert whole != take(96, num_images=48, local_batch_size=12)
    for world_size in (2, 3):
        share = 12 // world_size
        ranks = [
            take(96 // world_size, **chunks, rank=rank, world_size=world_size, local_batch_size=share)
            for rank in range(world_size)
        ]
        dealt = {position: index for stream in ranks for position, index in stream}
        assert sorted(dealt.items()) == whole
    for start in (1, 47, 50):
        assert take(96 - start, **chunks, local_batch_size=12, start_position=start) == whole[start:]
