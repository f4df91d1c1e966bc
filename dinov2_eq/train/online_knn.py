"""k-NN accuracy of the teacher during training."""

import logging
from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dinov2_eq.config.schema import Config
from dinov2_eq.data.labelled import LabelledImages, read_labelled
from dinov2_eq.data.loaders import make_eval_loader
from dinov2_eq.probes.features import encode_together, pooled_features
from dinov2_eq.probes.knn import knn_accuracy
from dinov2_eq.settings import CropsConfig, EvaluationConfig

BATCH_SIZE = 256
KNN_TOP1 = "eval/knn_top1"

logger = logging.getLogger(__name__)


def build_online_knn(config: Config, half_precision: bool) -> "OnlineKnn | None":
    """Builds the online k-NN, or returns None if it is off; raises ValueError as `OnlineKnn` does."""
    if config.evaluation.knn_period_steps == 0:
        return None
    return OnlineKnn(config.evaluation, config.crops, config.train.num_workers, half_precision)


class OnlineKnn:
    """k-NN on class tokens, from a labelled training subset to a validation subset; both are read anew in each call."""

    def __init__(
        self, evaluation: EvaluationConfig, crops: CropsConfig, num_workers: int, half_precision: bool
    ) -> None:
        """Raises ValueError if labels are missing or do not match, or if there are fewer training images than k."""
        self.k = evaluation.knn_k
        self.crops = crops
        self.num_workers = num_workers
        self.half_precision = half_precision
        self.train, self.val = read_labelled(
            evaluation.knn_train_dataset,
            [evaluation.knn_val_dataset],
            "the online k-NN",
            evaluation.knn_max_images,
            classes_without_images=True,
        )
        if self.k > len(self.train.indices):
            raise ValueError(
                f"evaluation.knn_k={self.k} is more than the {len(self.train.indices)} images of "
                f"evaluation.knn_train_dataset={evaluation.knn_train_dataset!r}; lower k or give more images"
            )

    def measure(self, backbone: nn.Module, device: torch.device) -> dict[str, float]:
        """Returns {"eval/knn_top1": accuracy in per cent}; all processes must call it.

        Args:
            backbone: in eval mode.

        Raises:
            ValueError: a feature is NaN or infinite.
        """
        train, val = (self._features(backbone, device, images) for images in (self.train, self.val))
        accuracies = knn_accuracy(train, self.train.labels, val, self.val.labels, ks=[self.k])
        logger.info("k-NN top-1 %.2f %%", accuracies[self.k]["top1"])
        return {KNN_TOP1: accuracies[self.k]["top1"]}

    def _features(self, backbone: nn.Module, device: torch.device, images: LabelledImages) -> Tensor:
        """Computes features [n, D] of all images; the processes share the work."""
        encode = partial(
            pooled_features, backbone, mean=self.crops.mean, std=self.crops.std, half_precision=self.half_precision
        )

        def make_batches(own: np.ndarray) -> Iterable[Tensor]:
            return make_eval_loader(images.dataset, own, self.crops.global_crops_size, BATCH_SIZE, self.num_workers)

        return encode_together(encode, make_batches, images.indices, device)
