"""AugSelf: theta can be read from the representations of the two views that it links.

Lee et al., *Improving Transferability of Representations via Augmentation-Aware Self-Supervision*, arXiv 2111.09613, in
the form of a baseline in Garrido et al., arXiv 2302.10283: one head reads all numbers of theta, with a squared error.
The original has a head for each augmentation and predicts the difference between the augmentations of both views. The
term goes beside that of a base method, such as SimCLR.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dinov2_eq.objectives.base import Context, Objective
from dinov2_eq.objectives.linked import LinkedSettings, LinkReader, mean_of_known
from dinov2_eq.settings import setting
from dinov2_eq.types import Scene, Term


@dataclass
class AugSelfConfig(LinkedSettings):
    loss_weight: float = setting(0.0, "weight of the AugSelf term; 0: not built", interval="[0, inf)")
    hidden_dim: int = setting(1024, "width of the head's two hidden layers", interval="[1, inf)")

    def weights(self) -> dict[str, float]:
        return {"augself": self.loss_weight}

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return AugSelf(self.hidden_dim, self.reader(context), dim)


class AugSelf(Objective):
    """Regression of theta from the representations of x and y, before any projector."""

    def __init__(self, hidden_dim: int, reader: LinkReader, dim: int) -> None:
        super().__init__()
        self.read = reader
        self.head = nn.Sequential(
            nn.Linear(2 * dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, len(reader.columns)),
        )

    def forward(self, scene: Scene) -> Term:
        linked = self.read(scene)
        predicted = self.head(torch.cat([linked.source, linked.target], dim=1))
        return Term(augself_loss(predicted, linked.theta, linked.known), {})


def augself_loss(predicted: Tensor, theta: Tensor, known: Tensor) -> Tensor:
    """Returns mean((predicted - theta) ** 2) over the known pairs of all processes, in float32; 0 if there are none.

    The numbers of g lie in [-1, 1]: predicting the middle of their range costs 1 / 3.

    Args:
        predicted, theta: [B, A], of this process's pairs.
        known: [B], 1 where theta is known, else 0.
    """
    return mean_of_known((predicted.float() - theta).square().mean(dim=1), known)
