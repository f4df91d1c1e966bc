"""VICReg: two views agree, every channel varies over the batch, and channels are uncorrelated.

Bardes et al., arXiv 2105.04906, scaled as in the authors' code, which gave their published results: the squared error
is averaged over channels, the variance term over the two views, and the covariance term is summed over the views.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.distributed import gather_rows_with_gradient
from dinov2_eq.layers.projector import build_projector
from dinov2_eq.objectives.base import Context, Needs, Objective, ObjectiveSettings, caution_of_single_images
from dinov2_eq.objectives.pooling import POOLS, pooled
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, Scene, Term

EPS = 1e-4  # added to variances
TARGET_STD = 1.0


@dataclass
class VicregConfig(ObjectiveSettings):
    loss_weight: float = setting(0.0, "weight of the VICReg term; 0: not built", interval="[0, inf)")
    invariance_coefficient: float = setting(25.0, "weight of the squared error between views", interval="[0, inf)")
    variance_coefficient: float = setting(
        25.0, "weight of the hinge on standard deviations below 1", interval="[0, inf)"
    )
    covariance_coefficient: float = setting(1.0, "weight of the squared covariances", interval="[0, inf)")
    pool: str = setting("cls", "what the expander sees: the class token, or the mean patch token", choices=POOLS)
    expander_dim: int = setting(8192, "width of the expander's three layers", interval="[1, inf)")

    def weights(self) -> dict[str, float]:
        return {"vicreg": self.loss_weight}

    def needs(self) -> Needs:
        return Needs()

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return VICReg(self, dim)

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        if self.loss_weight > 0:
            yield from caution_of_single_images(section, context, "variances are over one image of each process")


class VICReg(Objective):
    """VICReg between the expanded global views."""

    def __init__(self, settings: VicregConfig, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.expander = build_projector([dim, *[settings.expander_dim] * 3])

    def forward(self, scene: Scene) -> Term:
        settings = self.settings
        features = scene.student.invariant(pooled(scene.student.tokens[GLOBAL], settings.pool))  # [2, B, D]
        first, second = self.expander(features.flatten(0, 1)).chunk(2)
        invariance, variance, covariance = vicreg_terms(first, second)
        loss = (
            settings.invariance_coefficient * invariance
            + settings.variance_coefficient * variance
            + settings.covariance_coefficient * covariance
        )
        parts = {"vicreg_invariance": invariance, "vicreg_variance": variance, "vicreg_covariance": covariance}
        return Term(loss, {name: value.detach() for name, value in parts.items()})


def vicreg_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the invariance, variance and covariance terms in float32, over the images of all processes.

    invariance = mean((x - y) ** 2)

    Args:
        first, second: [B, D], the images of this process; the invariance term averages over these only.
    """
    with torch.autocast(first.device.type, enabled=False):
        return F.mse_loss(first.float(), second.float()), *spread_terms(first, second)


def spread_terms(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the variance and covariance terms in float32, over the images of all processes.

    for z in (x, y):                                          # [N, D]
        for d in range(D):
            variance += max(0, 1 - sqrt(var(z[:, d]) + 1e-4)) / (2 * D)
            for e in range(D):
                if e != d:
                    covariance += cov(z[:, d], z[:, e]) ** 2 / D

    var and cov divide by N - 1.

    Args:
        first, second: [B, D], the images of this process.
    """
    with torch.autocast(first.device.type, enabled=False):
        variance = covariance = first.new_zeros((), dtype=torch.float32)
        for own in (first, second):
            rows = gather_rows_with_gradient(own.float())  # [N, D]
            rows = rows - rows.mean(dim=0)
            freedom = max(len(rows) - 1, 1)
            std = torch.sqrt(rows.square().sum(0) / freedom + EPS)
            variance = variance + F.relu(TARGET_STD - std).mean() / 2
            matrix = rows.T @ rows / freedom  # [D, D]
            off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
            covariance = covariance + off_diagonal / matrix.shape[0]
        return variance, covariance
