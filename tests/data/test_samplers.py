from itertools import islice

import pytest

from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.samplers import StreamSampler


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
