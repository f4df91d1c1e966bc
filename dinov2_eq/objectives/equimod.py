"""EquiMod: the embedding of y can be predicted from that of x and from theta.

Devillers and Lefort, *EquiMod: An Equivariance Module to Improve Visual Instance Discrimination*, arXiv 2211.01244,
with the two views of its form as a baseline in Garrido et al., arXiv 2302.10283: NT-Xent between the predicted
embedding of y and the embedding of y. The term goes beside that of a base method with a projector of its own, such as
SimCLR.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from dinov2_eq.layers.projector import build_projector
from dinov2_eq.objectives.base import Context, Objective, caution_of_single_images
from dinov2_eq.objectives.linked import LinkedSettings, LinkReader
from dinov2_eq.objectives.simclr import nt_xent
from dinov2_eq.settings import setting
from dinov2_eq.types import Scene, Term


@dataclass
class EquimodConfig(LinkedSettings):
    loss_weight: float = setting(0.0, "weight of the EquiMod term; 0: not built", interval="[0, inf)")
    temperature: float = setting(0.2, "divides the cosines before the softmax", interval="(0, inf)")
    projector_hidden_dim: int = setting(2048, "width of the projector's two hidden layers", interval="[1, inf)")
    projector_out_dim: int = setting(128, "width of the projector's output", interval="[1, inf)")

    def weights(self) -> dict[str, float]:
        return {"equimod": self.loss_weight}

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return EquiMod(self, self.reader(context), dim)

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        yield from super().cautions(section, context)
        if self.is_built():
            yield from caution_of_single_images(section, context, "only other processes give negatives")


class EquiMod(Objective):
    """NT-Xent between predicted and true embeddings of y, over the pairs with known theta.

    The predictor is one linear layer, as the authors'. Their linear encoding of theta in front of it would add nothing
    without the normalisation behind it, which numbers in [-1, 1] do not need.
    """

    def __init__(self, settings: EquimodConfig, reader: LinkReader, dim: int) -> None:
        super().__init__()
        self.read, self.temperature = reader, settings.temperature
        hidden, out = settings.projector_hidden_dim, settings.projector_out_dim
        self.projector = build_projector([dim, hidden, hidden, out])
        self.predictor = nn.Linear(out + len(reader.columns), out)

    def forward(self, scene: Scene) -> Term:
        linked = self.read(scene)
        source, target = self.projector(torch.cat([linked.source, linked.target])).chunk(2)
        predicted = self.predictor(torch.cat([source, linked.theta], dim=1))
        return Term(nt_xent(predicted, target, self.temperature, linked.known), {})
