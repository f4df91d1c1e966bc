"""What can go wrong before the first step, found without memory for weights."""

import torch

from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.train.build import build_arch, build_multi_crop
from dinov2_eq.train.cautions import cautions
from dinov2_eq.train.estimate import plan
from dinov2_eq.train.online_knn import build_online_knn
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch


def outline(config: Config) -> SSLMetaArch:
    """The modules of a run, on the meta device.

    Raises:
        ValueError: they cannot be built.
    """
    build_multi_crop(config)
    return build_arch(config, torch.device("meta"))


def count_images(config: Config, half_precision: bool) -> int:
    """Number of training images; the data of the online k-NN are opened too.

    Raises:
        ValueError, OSError: data that a run could not use.
    """
    build_online_knn(config, half_precision)
    return len(build_dataset(config.train.dataset_path))


def print_plan(config: Config, half_precision: bool) -> None:
    """Prints what a run will take, and its cautions. Data that cannot be opened leave out the passes over them only.

    Raises:
        ValueError, OSError: the run cannot work.
    """
    arch, num_images = outline(config), None
    try:
        num_images = count_images(config, half_precision)
    finally:
        print(plan(config, arch, num_images, half_precision), *cautions(config), sep="\n", flush=True)
