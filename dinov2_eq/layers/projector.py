"""The MLP in front of a contrastive or variance-based loss."""

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from dinov2_eq.layers.batch_norm import SyncBatchNorm


def build_projector(widths: Sequence[int]) -> nn.Sequential:
    """Builds linear layers between the given widths, with batch normalisation and ReLU between them.

    The last layer has no bias and no normalisation, as in VICReg's expander (Bardes et al., arXiv 2105.04906).
    """
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths[:-1]):
        layers += [nn.Linear(width, next_width), SyncBatchNorm(next_width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=False))
