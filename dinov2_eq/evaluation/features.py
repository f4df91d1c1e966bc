"""Frozen features of datasets, computed by all processes of an evaluation together."""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.labelled import LabelledImages
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.distributed import from_main_process, is_main_process
from dinov2_eq.evaluation.encoder import Encoder, fingerprint
from dinov2_eq.files import whole_file
from dinov2_eq.logging import progress_bar
from dinov2_eq.probes.features import block_features, encode_together, pooled_features

# Preprocessing of `make_eval_loader` and `make_whole_image_loader`, for results files.
CENTRE = "short side to 256/224 of the input size (up to 64 pixels: to the input size), bicubic, centre crop"
WHOLE = "short side to the input size, bicubic, centre crop"

logger = logging.getLogger(__name__)


class FeatureStore:
    """Cache of the features of one encoder on disk, for evaluations that read the same images.

    A file is reused only for the same weights, data string, images and preprocessing. If data change under the same
    data string, delete the folder: the change is not detected.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder = folder
        self.encoder = fingerprint(encoder.backbone)

    def features(self, compute: Callable[[], Tensor], images: LabelledImages, **how: Any) -> Tensor:
        """Returns the stored features of these images, or computes and stores them.

        All processes must call it. `compute` returns all features in each of them; `how` is the preprocessing.
        """
        key = json.dumps([self.encoder, images.dataset.data_string, len(images.dataset), how], default=str)
        digest = hashlib.sha256(key.encode() + np.ascontiguousarray(images.indices).tobytes()).hexdigest()
        path = self.folder / f"{digest}.pt"
        if from_main_process(path.is_file):
            logger.info("%s: features of %d images, computed before", images.dataset.data_string, len(images.indices))
            return torch.load(path, weights_only=True)
        features = compute()
        if is_main_process():
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(path) as temporary, temporary.open("wb") as file:
                torch.save(features, file)
        return features


class FeatureExtractor:
    """Computes features of one encoder, whose backbone moves to `device`; all processes call the methods together.

    Args:
        batch_size: images in one forward of one process.
        half_precision: run the backbone under bfloat16 autocast.
        make_loader: `make_eval_loader`, or `make_whole_image_loader`.
        store: cache of pooled features; None: no cache.
    """

    def __init__(
        self,
        encoder: Encoder,
        device: torch.device,
        *,
        batch_size: int,
        num_workers: int,
        half_precision: bool = False,
        make_loader: Callable[..., Iterable[Tensor]] = make_eval_loader,
        store: FeatureStore | None = None,
    ) -> None:
        self.encoder = encoder
        self.device = device
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.make_loader = make_loader
        self.store = store
        self._shared = {"mean": encoder.mean, "std": encoder.std, "half_precision": half_precision}
        encoder.backbone.to(device)

    def pooled(self, images: LabelledImages, mode: str = "cls") -> Tensor:
        """Computes `pooled_features` of all images, [N, D or 2D] on the CPU, in every process.

        Raises:
            ValueError: a feature is NaN or infinite, there are no images, or one cannot be read.
        """
        encode = partial(pooled_features, self.encoder.backbone, mode=mode, **self._shared)
        compute = partial(self._extract, encode, images)
        if self.store is None:
            return compute()
        size, loader = self.encoder.image_size, self.make_loader.__name__
        return self.store.features(compute, images, mode=mode, size=size, loader=loader, **self._shared)

    def own_blocks(self, images: LabelledImages, num_blocks: int) -> Tensor:
        """Computes `block_features` of this process's `own_share` of the images, on the CPU; raises as `pooled`."""
        return self._extract(partial(self.encode_blocks, num_blocks=num_blocks), images, gather=False)

    def encode_blocks(self, pixels: Tensor, num_blocks: int) -> Tensor:
        """Computes `block_features` of pixels [B, 3, S, S] in [0, 1] on the device of the encoder."""
        return block_features(self.encoder.backbone, pixels, num_blocks=num_blocks, **self._shared)

    def _extract(self, encode: Callable[[Tensor], Tensor], images: LabelledImages, gather: bool = True) -> Tensor:
        def make_batches(indices: np.ndarray) -> Iterable[Tensor]:
            size = self.encoder.image_size
            loader = self.make_loader(images.dataset, indices, size, self.batch_size, self.num_workers)
            return progress_bar(loader, unit="batch")

        started = time.perf_counter()
        features = encode_together(encode, make_batches, images.indices, self.device, gather=gather)
        seconds = time.perf_counter() - started
        logger.info("%s: features of %d images, %.0f s", images.dataset.data_string, len(images.indices), seconds)
        return features
