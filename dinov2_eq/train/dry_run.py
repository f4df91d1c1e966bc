"""The checks of `dinov2-eq train --dry-run`, which allocate no memory for weights."""

import torch

from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.train.build import build_arch, build_multi_crop
from dinov2_eq.train.cautions import cautions
from dinov2_eq.train.estimate import plan
from dinov2_eq.train.online_knn import build_online_knn
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch


def outline(config: Config) -> SSLMetaArch:
    """Builds the modules of a run on the meta device.

    Raises:
        ValueError: the modules cannot be built.
    """
    build_multi_crop(config)
    return build_arch(config, torch.device("meta"))


def count_images(config: Config, half_precision: bool) -> int:
    """Returns the number of training images, and checks that the data of the online k-NN can be opened.

    Raises:
        ValueError, OSError: the data cannot be used.
    """
    build_online_knn(config, half_precision)
    return len(build_dataset(config.train.dataset_path))


def print_plan(config: Config, half_precision: bool) -> None:
    """Prints the plan and the cautions of a run; without usable data, only the number of passes is missing.

    Raises:
        ValueError, OSError: the modules cannot be built, or (after printing) the data cannot be used.
    """
    arch, num_images = outline(config), None
    try:
        num_images = count_images(config, half_precision)
    finally:
        print(plan(config, arch, num_images, half_precision), *cautions(config), sep="\n", flush=True)
