"""The KoLeo regulariser (Sablayrolles et al., arXiv 1806.03198): spreads the features of a batch over the sphere."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.objectives.base import Objective
from dinov2_eq.types import GLOBAL, Scene, Term

EPS = 1e-8


class KoLeo(Objective):
    """KoLeo on the class tokens of the student, view by view."""

    def forward(self, scene: Scene) -> Term:
        views = scene.student.invariant(scene.student.tokens[GLOBAL].cls)  # [2, B, D]
        return Term(sum(koleo_loss(view) for view in views), {})


def koleo_loss(features: Tensor) -> Tensor:
    """Computes the mean of -log(distance to the nearest neighbour) of L2-normalised features, in float32.

    z = normalize(features)
    loss = 0
    for i in range(B):
        nearest = max((j for j in range(B) if j != i), key=lambda j: z[i] @ z[j])
        loss -= log(norm(z[i] - z[nearest] + 1e-8) + 1e-8)
    return loss / B

    Args:
        features: [B, D] of one view of each image of this process. B = 1 has no neighbour and gives 0; duplicates give
            a large but finite value.
    """
    with torch.autocast(features.device.type, enabled=False):
        features = features.float()
        if len(features) < 2:
            return features.sum() * 0.0
        normed = F.normalize(features, dim=-1)
        with torch.no_grad():
            similarity = normed @ normed.T  # [B, B]
            nearest = similarity.fill_diagonal_(-2.0).argmax(dim=1)  # [B]
        distances = F.pairwise_distance(normed, normed[nearest], eps=EPS)
        return -torch.log(distances + EPS).mean()
