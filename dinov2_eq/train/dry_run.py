"""What can go wrong before the first step, found without memory for weights."""

import torch

from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.train.build import build_arch, build_multi_crop
from dinov2_eq.train.online_knn import build_online_knn
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch


def dry_run(config: Config, half_precision: bool) -> tuple[SSLMetaArch, int]:
    """Builds what a run builds first.

    Returns:
        The modules, on the meta device, and the number of training images: what `estimate.plan` asks for.

    Raises:
        ValueError, OSError: the run cannot work.
    """
    arch = build_arch(config, torch.device("meta"))
    build_multi_crop(config)
    build_online_knn(config, half_precision)
    return arch, len(build_dataset(config.train.dataset_path))
