"""Random crops for linear heads: the stream does not depend on workers, processes or interruptions."""

from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.data.crops import crop_resized, draw_crop_box
from dinov2_eq.data.datasets import DataError, build_dataset
from dinov2_eq.data.linear_loader import CROP_SCALE, make_linear_loader, make_whole_image_loader
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.data.samplers import StreamSampler
from dinov2_eq.data.seeding import Stream, torch_generator

DATASET = build_dataset("Shapes:num=30:size=24")
CHOSEN = np.arange(0, 30, 2)
LABELS = torch.from_numpy(CHOSEN) * 10  # so that a label tells its image


def take(count, batch_size=8, rank=0, world_size=1, start=0, workers=0, seed=5):
    loader = make_linear_loader(
        *(DATASET, CHOSEN, LABELS, 16),
        seed=seed,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        start_position=start,
        num_workers=workers,
    )
    images, labels = zip(*islice(loader, count), strict=True)
    return torch.cat(images), torch.cat(labels)


def assert_same(first, second):
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_processes_workers_and_a_new_start_change_nothing():
    whole = take(4)
    assert whole[0].shape == (32, 3, 16, 16) and whole[0].dtype == torch.uint8
    assert_same(take(4, workers=2), whole)
    assert_same(take(2, start=16), [part[16:] for part in whole])
    first, second = (take(4, batch_size=4, rank=rank, world_size=2) for rank in (0, 1))
    together = [
        torch.stack([a.unflatten(0, (4, 4)), b.unflatten(0, (4, 4))], 1).flatten(0, 2)
        for a, b in zip(first, second, strict=True)
    ]
    assert_same(together, whole)
    assert not torch.equal(take(4, seed=6)[0], whole[0])


def test_every_chosen_image_comes_once_in_a_pass_with_its_label():
    _, labels = take(3, batch_size=5)
    assert sorted(labels.tolist()) == LABELS.tolist()


def test_a_crop_is_the_one_of_its_position_and_half_are_flipped():
    images, _ = take(5)
    places = list(islice(StreamSampler(len(CHOSEN), 5, 8, 0, 1), 40))
    flipped = 0
    for (position, number), pixels in zip(places, images, strict=True):
        generator = torch_generator(Stream.SAMPLE, 5, position)
        image = DATASET.read(int(CHOSEN[number]))
        crop = crop_resized(image, draw_crop_box(image.size, CROP_SCALE, generator), (16, 16)).transpose(2, 0, 1)
        is_flipped = not np.array_equal(pixels.numpy(), crop)
        assert np.array_equal(pixels.numpy(), crop[:, :, ::-1] if is_flipped else crop)
        flipped += is_flipped
    assert 10 <= flipped <= 30


def test_an_image_that_cannot_be_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(b"no image")
    dataset = build_dataset(f"ImageFolder:root={tmp_path}")
    loader = make_linear_loader(
        *(dataset, np.arange(2), torch.tensor(dataset.labels), 16), seed=0, batch_size=2, rank=0, world_size=1
    )
    with pytest.raises(DataError, match=r"Cannot evaluate on an image that cannot be read: .*1\.png"):
        next(iter(loader))


def test_whole_images_keep_what_the_centre_crop_cuts(tmp_path):
    """A 112 x 112 image with a frame: at 112 pixels it is either there, or cut off."""
    (tmp_path / "a").mkdir()
    pixels = np.zeros((112, 112, 3), dtype=np.uint8)
    pixels[:3] = pixels[-3:] = 255
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    dataset = build_dataset(f"ImageFolder:root={tmp_path}")
    (whole,), (centre,) = (make(dataset, [0], 112, 1) for make in (make_whole_image_loader, make_eval_loader))
    assert torch.equal(whole[0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert centre.max() < 0.1
