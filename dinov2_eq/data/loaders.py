"""Data loaders for training (an endless stream of views) and evaluation (images in order)."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms

from dinov2_eq.data.augmentations import MultiCrop
from dinov2_eq.data.collate import Collate
from dinov2_eq.data.corrupt import read_or_next
from dinov2_eq.data.datasets import DataError, ImageDataset, UnreadableImage
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.data.samplers import StreamSampler
from dinov2_eq.data.seeding import Stream, numpy_generator, torch_generator
from dinov2_eq.data.workers import Loader
from dinov2_eq.types import CollatedBatch, PathViews, Sample

SMALL_IMAGE_SIZE = 64  # pixels; up to this size, evaluation crops nothing off the short side
RESIZE_FACTOR = 256 / 224


class TrainingSamples(Dataset[Sample]):
    """Dataset that reads and crops; a sample depends only on (seed, position) and its image, not on the worker.

    Args:
        known_share: share of the images whose theta objectives may use, always the same ones for a seed.
    """

    def __init__(self, dataset: ImageDataset, multi_crop: MultiCrop, seed: int, known_share: float = 1.0) -> None:
        self.dataset = dataset
        self.multi_crop = multi_crop
        self.seed = seed
        self.known_share = known_share

    def __getitem__(self, place: tuple[int, int]) -> Sample:
        position, index = place
        generator = torch_generator(Stream.SAMPLE, self.seed, position)
        pairs = self.multi_crop.pairing.reads_pairs
        read = partial(self.dataset.read_pair, generator=generator) if pairs else self.dataset.read
        item, skipped = read_or_next(self.dataset, index, read)
        sample = self.multi_crop(item, generator, position=position, skipped=skipped)
        if self.known_share == 1 or numpy_generator(Stream.KNOWN, self.seed, index).random() < self.known_share:
            return sample
        return sample._replace(drawn=sample.drawn._replace(known=False))


def make_train_loader(
    dataset: ImageDataset,
    multi_crop: MultiCrop,
    masking: BlockMasking | None,
    *,
    seed: int,
    batch_size: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
    start_position: int = 0,
    num_workers: int = 0,
    path: PathViews | None = None,
    known_share: float = 1.0,
) -> DataLoader[CollatedBatch]:
    """Makes an endless loader of `CollatedBatch` for one process.

    The sample at a position of the stream depends only on the seed and on `global_batch_size` (masks). The batches of
    all processes together are therefore the same for any `world_size`, `num_workers` and split into microbatches, and
    a loader that starts at `start_position` continues the stream exactly.

    Args:
        batch_size: images of one process in one microbatch.
        global_batch_size: images of one optimizer step, over all processes and microbatches.
        start_position: number of samples that all processes together have seen already.
        path: see `Collate`.
        known_share: see `TrainingSamples`.

    Raises:
        DataError: the dataset is empty.
        ValueError: the processes' batches do not add up to the global batch.
    """
    if global_batch_size % (batch_size * world_size):
        raise ValueError(
            f"global_batch_size={global_batch_size} is not a multiple of batch_size={batch_size} times "
            f"world_size={world_size}."
        )
    sampler = StreamSampler(len(dataset), seed, batch_size, rank, world_size, start_position, dataset.chunk_ends)
    return Loader(
        TrainingSamples(dataset, multi_crop, seed, known_share),
        batch_size=batch_size,
        sampler=sampler,
        collate_fn=Collate(masking, seed, global_batch_size, path),
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
    )


def to_device(batch: CollatedBatch, device: torch.device) -> CollatedBatch:
    """Moves a batch to `device`, except the photometric parameters, which `apply_photometric` needs on the CPU."""
    tensors = {name: value for name, value in batch._asdict().items() if isinstance(value, Tensor)}
    return batch._replace(**{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def resize_and_crop(short_side: int, size: int) -> transforms.Compose:
    """Returns a transform that resizes the short side (bicubic) and crops the centre to [3, size, size] uint8."""
    bicubic = transforms.InterpolationMode.BICUBIC
    return transforms.Compose(
        [transforms.Resize(short_side, bicubic), transforms.CenterCrop(size), transforms.PILToTensor()]
    )


def read_to_evaluate(dataset: ImageDataset, index: int) -> Image.Image:
    """Reads an image; raises DataError if that fails, since an evaluation must not skip images."""
    try:
        return dataset.read(index)
    except UnreadableImage as error:
        raise DataError(f"Cannot evaluate on an image that cannot be read: {error}. Repair or remove it.") from None


class EvaluationSamples(Dataset[Tensor]):
    """Dataset of images [3, S, S] uint8, S = `image_size`.

    Args:
        short_side: length in pixels before the crop; None: as in `make_eval_loader`.
    """

    def __init__(self, dataset: ImageDataset, image_size: int, short_side: int | None = None) -> None:
        if short_side is None:
            short_side = image_size if image_size <= SMALL_IMAGE_SIZE else round(image_size * RESIZE_FACTOR)
        self.dataset = dataset
        self.preprocess = resize_and_crop(short_side, image_size)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Tensor:
        return self.preprocess(read_to_evaluate(self.dataset, index))


def make_eval_loader(
    dataset: ImageDataset, indices: Sequence[int], image_size: int, batch_size: int, num_workers: int = 0
) -> DataLoader[Tensor]:
    """Makes a loader of images [B, 3, S, S] float in [0, 1], not normalised, in the order of `indices`.

    The short side is resized to 256/224 of `image_size` = S (bicubic), then the centre is cropped, as DINOv2 does; up
    to S = 64 the short side is resized to S.

    Raises:
        DataError: while iterating, when an image cannot be read.
    """
    return Loader(
        Subset(EvaluationSamples(dataset, image_size), [int(index) for index in indices]),
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate_evaluation,
    )


def _collate_evaluation(images: Sequence[Tensor]) -> Tensor:
    return torch.stack(images).float() / 255


def fixed_subset(num_images: int, max_images: int, seed: int = 0) -> np.ndarray:
    """Returns indices [min(num_images, max_images)] int64: the first ones of a fixed shuffle, sorted."""
    order = numpy_generator(Stream.SUBSET, seed).permutation(num_images)
    return np.sort(order[:max_images])
