"""Order of strengths: the more an image is changed, the farther its features move.

Our reading of Xie, Wen, Lau, Rehman, Shen, *What Should Be Equivariant in Self-Supervised Learning* (CVPR 2022
workshop L3D-IVU). Only its abstract is public to us: the embedding keeps the order of a transformation's scale for some
transformations, and is invariant to the others. The loss, the distance, the margin and the strengths are our choices.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.objectives.base import Context, Needs, Objective
from dinov2_eq.objectives.linked import mean_of_known
from dinov2_eq.objectives.pooling import POOLS, pooled
from dinov2_eq.objectives.transformed import TransformSettings
from dinov2_eq.probes.order import feature_distances, order_accuracy, pairs_of
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, PATH, PathViews, Scene, Term

FRACTIONS = (1 / 3, 2 / 3, 1.0)  # of theta


@dataclass
class OrderConfig(TransformSettings):
    loss_weight: float = setting(0.0, "weight of the order term; 0: not built", interval="[0, inf)")
    margin: float = setting(
        0.2,
        "by how much farther, in 1 - cosine, the strongest change moves the features than no change; in proportion for "
        "strengths that differ less",
        interval="(0, 2]",
    )
    share: float = setting(
        0.5, "share of the images that the term sees, each in three more global views", interval="(0, 1]"
    )
    pool: str = setting(
        "cls", "which vector represents a view: the class token, or the mean patch token", choices=POOLS
    )

    def weights(self) -> dict[str, float]:
        return {"order": self.loss_weight}

    def needs(self) -> Needs:
        if self.loss_weight == 0:
            return Needs()
        path = PathViews(FRACTIONS, self.share, with_base=True)
        return Needs(theta=True, pairing=self.pairing(second=0.0), path=path)

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return Order(self.build_transform(), self.margin, self.pool)

    def problems(self, section: str, context: Context) -> Iterator[str]:
        if self.loss_weight == 0:
            return
        try:
            transform = self.build_transform()
        except ValueError:  # reported where g is built
            return
        if not transform.largest.any():
            names = " and ".join(transform.components) or "no parameter"
            yield (
                f"{section}.transform={self.transform} changes nothing (the range of {names} is 0), so there are no "
                f"strengths to order. Widen its range, or set {section}.loss_weight=0"
            )

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        others = (each for name, each in context.sections.items() if name != section and each.is_used())
        if self.loss_weight > 0 and not any(weight > 0 for each in others for weight in each.weights().values()):
            yield (
                f"{section} is the only loss: features that tell strengths apart, and nothing else, satisfy it. Add a "
                "base method, for example simclr.loss_weight=1"
            )


class Order(Objective):
    """Margin ranking of the distances between u and g at three fractions of theta."""

    def __init__(self, transform: Transform, margin: float, pool: str) -> None:
        super().__init__()
        self.strength, self.margin, self.pool = transform.strength, margin, pool

    def forward(self, scene: Scene) -> Term:
        student, rows = scene.student, scene.views.path_rows
        base = student.invariant(pooled(student.tokens[GLOBAL], self.pool)[1, rows])  # [R, D]
        changed = student.invariant(pooled(student.tokens[PATH], self.pool))  # [3, R, D]
        theta, known = scene.views.theta[rows], scene.views.known[rows].float()
        distances = feature_distances(base.float(), changed.float())
        strengths = torch.stack([fraction * self.strength(theta) for fraction in FRACTIONS])  # [3, R]
        accuracy = mean_of_known(order_accuracy(distances.detach()).float(), known)
        return Term(order_loss(distances, strengths, known, self.margin), {"order_accuracy": accuracy})


def order_loss(distances: Tensor, strengths: Tensor, known: Tensor, margin: float) -> Tensor:
    """Mean hinge over the images with known theta, of all processes, and over their pairs of strengths.

    for each image:
        for a < b:
            loss += max(0, d[a] + margin * (strength[b] - strength[a]) - d[b])

    Args:
        distances: [S, R] of this process's images, the weakest change first.
        strengths: [S, R] in [0, 1], in the same order.
        known: [R], 1 or 0.
    """
    first, second = pairs_of(distances)
    wanted = margin * (strengths[second] - strengths[first])
    return mean_of_known(F.relu(distances[first] + wanted - distances[second]).mean(dim=0), known)
