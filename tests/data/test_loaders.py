"""The stream of batches does not depend on workers, processes, accumulation or interruptions."""

import io
import pickle
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dinov2_eq.data import samplers
from dinov2_eq.data.augmentations import MultiCrop
from dinov2_eq.data.datasets import DataError, build_dataset
from dinov2_eq.data.loaders import fixed_subset, make_eval_loader, make_train_loader, to_device
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.equivariance.pairing import TransformPairing
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.settings import CropsConfig
from dinov2_eq.types import PathViews
from tests.data.datasets.tars import write_tar

SEED = 7


def train_loader(num_images=20, dataset=None, probability=0.5, **changes):
    crops = CropsConfig(global_crops_size=16, local_crops_size=8)
    multi_crop = MultiCrop(crops, TransformPairing(build_transform("se2"), "canvas"), num_local=2)
    arguments = {"seed": SEED, "batch_size": 8, "global_batch_size": 8, "rank": 0, "world_size": 1, **changes}
    dataset = build_dataset(f"Shapes:num={num_images}:size=24") if dataset is None else dataset
    return make_train_loader(dataset, multi_crop, BlockMasking((4, 4), (0.1, 0.5), probability), **arguments)


def take(count, **changes):
    return list(islice(iter(train_loader(**changes)), count))


# Where the batch axis of each field is
BATCH_AXIS = {"anchor_crops": 0, "base_canvases": 0, "local_crops": 1, "theta": 0, "masks": 1}


def joined(batches):
    """Concatenates the tensors of several batches."""
    tensors = {name: torch.cat([vars_of(b)[name] for b in batches], axis) for name, axis in BATCH_AXIS.items()}
    for name in batches[0].photometric._fields:
        tensors[name] = torch.cat([b.photometric._asdict()[name] for b in batches], 1)
    return tensors


def vars_of(batch):
    return batch._asdict()


def assert_same(batches, others):
    first, second = joined(batches), joined(others)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_batch_has_the_promised_axes():
    (batch,) = take(1)
    size = build_transform("se2").canvas_size((16, 16))
    assert batch.skipped == () and batch.known.all()
    assert batch.anchor_crops.shape == (8, 3, 16, 16)
    assert batch.base_canvases.shape == (8, 3, *size)
    assert batch.local_crops.shape == (2, 8, 3, 8, 8)
    assert batch.photometric.hue.shape == (4, 8) and batch.photometric.order.shape == (4, 8, 4)
    assert batch.theta.shape == (8, 3)
    assert batch.masks.shape == (2, 8, 16) and batch.masks.any(-1).sum() == 8


def test_workers_do_not_change_the_stream():
    assert_same(take(5), take(5, num_workers=2))


@pytest.mark.parametrize("batch_size", [4, 2])  # 2: two microbatches in a step
def test_processes_and_accumulation_do_not_change_the_stream(batch_size):
    single = take(3)
    ranks = [take(24 // (2 * batch_size), batch_size=batch_size, rank=rank, world_size=2) for rank in (0, 1)]
    merged = [batch for microbatch in zip(*ranks, strict=True) for batch in microbatch]
    assert_same(single, merged)


def test_resume_is_exact():
    whole = take(6)
    assert_same(whole[3:], take(3, start_position=24))
    ranks = [take(3, batch_size=4, rank=rank, world_size=2, start_position=24) for rank in (0, 1)]
    assert_same(whole[3:], [batch for microbatch in zip(*ranks, strict=True) for batch in microbatch])


def test_samples_differ_between_passes_and_seeds():
    first, second = take(2, num_images=8)
    assert not torch.equal(first.anchor_crops, second.anchor_crops)
    assert not torch.equal(first.theta.sort(0).values, second.theta.sort(0).values)
    assert not torch.equal(first.theta, take(1, num_images=8, seed=SEED + 1)[0].theta)


def test_iterating_leaves_the_global_random_state_alone():
    state = torch.get_rng_state()
    take(2)
    assert torch.equal(torch.get_rng_state(), state)


def test_masked_patches_are_the_places_in_the_masks():
    for batch in take(3):
        flat = batch.masks.flatten()
        assert flat[batch.masked_patches].all() and len(batch.masked_patches) == flat.sum()


@pytest.mark.parametrize("share", [0.25, 0.3, 1.0])
def test_a_share_of_the_images_has_a_path_on_any_number_of_processes(share):
    def rows(batches):
        return torch.cat([batch.anchor_crops[batch.path_rows] for batch in batches])

    path = PathViews((1.0,), share)
    whole = take(5, path=path)
    assert sum(len(batch.path_rows) for batch in whole) == int(40 * share)
    ranks = [take(5, batch_size=4, rank=rank, world_size=2, path=path) for rank in (0, 1)]
    merged = [batch for together in zip(*ranks, strict=True) for batch in together]
    assert torch.equal(rows(whole), rows(merged))


def test_a_base_view_that_an_objective_reads_is_never_masked():
    path = PathViews((1.0,), 0.5, with_base=True)
    for batch, other in zip(take(4, path=path), take(4), strict=True):
        assert not batch.masks[1, batch.path_rows].any()
        assert batch.masks.any(-1).sum() == other.masks.any(-1).sum()  # as many crops as ever
    parts = [take(4, batch_size=4, rank=rank, world_size=2, path=path) for rank in (0, 1)]
    assert_same(take(4, path=path), [batch for together in zip(*parts, strict=True) for batch in together])


def test_batch_larger_than_the_dataset_and_no_masks():
    (batch,) = take(1, num_images=3, probability=0.0)
    assert len(batch.anchor_crops) == 8
    assert not batch.masks.any()


def test_unreadable_images_are_replaced_and_named(tmp_path):
    for index in range(8):
        Image.new("RGB", (9, 9), (index, 0, 0)).save(tmp_path / f"{index}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    (batch,) = take(1, dataset=build_dataset(f"Folder:root={tmp_path}"))
    (skipped,) = batch.skipped
    assert skipped.startswith(f"{tmp_path}/3.png: UnidentifiedImageError")
    for path in tmp_path.iterdir():
        path.write_bytes(b"broken")
    for num_workers in (0, 1):
        with pytest.raises(DataError, match="8 images in a row"):
            take(1, dataset=build_dataset(f"Folder:root={tmp_path}"), num_workers=num_workers)


def test_loader_parts_are_picklable_for_spawned_workers():
    loader = train_loader()
    for part in (loader.dataset, loader.collate_fn, loader.worker_init_fn, loader.sampler):
        pickle.loads(pickle.dumps(part))


@pytest.fixture(params=["WebDataset", "Parquet"])
def packed(request, tmp_path, monkeypatch):
    """24 images, number n in the colour (n, 0, 0), in 4 tar files or in 8 row groups that are dealt in 3 windows."""
    monkeypatch.setattr(samplers, "WINDOW_CHUNKS", 2)
    monkeypatch.setattr(samplers, "WINDOW_IMAGES", 8)
    encoded = []
    for number in range(24):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20), (number, 0, 0)).save(buffer, format="PNG")
        encoded.append(buffer.getvalue())
    if request.param == "Parquet":
        pq.write_table(pa.table({"image": encoded}), tmp_path / "a.parquet", row_group_size=3)
        return build_dataset(f"Parquet:path={tmp_path}")
    for shard in range(4):
        files = {f"{number:04d}.png": encoded[number] for number in range(6 * shard, 6 * shard + 6)}
        write_tar(tmp_path / f"{shard}.tar", files)
    return build_dataset(f"WebDataset:urls={tmp_path}/{{0..3}}.tar")


def test_packed_data_give_one_stream_however_they_are_read(packed):
    arguments = {"dataset": packed, "global_batch_size": 12}
    whole = take(12, batch_size=4, **arguments)
    numbers = torch.cat([batch.anchor_crops[:, 0, 0, 0] for batch in whole]).tolist()
    assert sorted(numbers[:24]) == sorted(numbers[24:]) == list(range(24))
    assert numbers[:24] != numbers[24:]
    assert_same(whole, take(12, batch_size=4, num_workers=2, **arguments))
    for world_size, num_workers in ((2, 2), (3, 0)):
        ranks = [
            take(24 // world_size, batch_size=2, rank=rank, world_size=world_size, num_workers=num_workers, **arguments)
            for rank in range(world_size)
        ]
        assert_same(whole, [batch for together in zip(*ranks, strict=True) for batch in together])
    for start in (1, 5, 7):
        assert_same(whole[start:], take(12 - start, batch_size=4, start_position=4 * start, **arguments))


def test_batch_sizes_must_fit():
    with pytest.raises(ValueError, match=r"global_batch_size=8 .* batch_size=3 times world_size=1"):
        train_loader(batch_size=3)


def test_to_device_keeps_every_field():
    (batch,) = take(1)
    moved = to_device(batch, torch.device("meta"))
    assert {vars_of(moved)[name].device.type for name in BATCH_AXIS} == {"meta"}
    assert moved.photometric is batch.photometric and moved.skipped is batch.skipped


# evaluation


def test_eval_loader_gives_images_in_order():
    dataset = build_dataset("Shapes:num=12:size=24")
    indices = [7, 0, 11]
    batches = list(make_eval_loader(dataset, indices, 16, 2))
    assert [len(images) for images in batches] == [2, 1]
    images = torch.cat(batches)
    assert images.shape == (3, 3, 16, 16) and images.dtype == torch.float32
    for image, index in zip(images, indices, strict=True):
        expected = np.array(dataset.read(index).resize((16, 16), Image.Resampling.BICUBIC))
        assert torch.equal(image, torch.from_numpy(expected).permute(2, 0, 1).float() / 255)
    with_workers = torch.cat(list(make_eval_loader(dataset, indices, 16, 2, num_workers=2)))
    assert torch.equal(with_workers, images)


def test_eval_loader_crops_the_centre_of_larger_images(tmp_path):
    pixels = np.zeros((256, 512, 3), dtype=np.uint8)
    pixels[16:240, 144:368] = 255  # what a resize to 256 and a centre crop of 224 keep
    Image.fromarray(pixels).save(tmp_path / "1.png")
    (images,) = make_eval_loader(build_dataset(f"Folder:root={tmp_path}"), [0], 224, 4)
    assert images.shape == (1, 3, 224, 224)
    assert (images == 1).all()


def test_eval_loader_stops_at_an_unreadable_image(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"broken")
    with pytest.raises(DataError, match=r"bad\.png"):
        list(make_eval_loader(build_dataset(f"Folder:root={tmp_path}"), [0], 32, 4))


def test_fixed_subset():
    small, large = fixed_subset(100, 10), fixed_subset(100, 30)
    assert len(small) == 10 and set(small) < set(large)
    assert fixed_subset(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert small.tolist() == fixed_subset(100, 10).tolist() != fixed_subset(100, 10, seed=1).tolist()
