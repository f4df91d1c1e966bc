"""A method of somebody else's, in a file of its own: class tokens of half of the images should tell the angle."""

from dataclasses import dataclass

import torch
from torch import nn

from dinov2_eq.equivariance.pairing import TransformPairing
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.objectives.base import Context, Needs, Objective, ObjectiveSettings
from dinov2_eq.settings import setting
from dinov2_eq.types import PATH, PathViews, Scene, Term


@dataclass
class ToyConfig(ObjectiveSettings):
    loss_weight: float = setting(0.0, "weight of the toy", interval="[0, inf)")
    share: float = setting(0.5, "of the images", interval="(0, 1]")

    def weights(self) -> dict[str, float]:
        return {"toy": self.loss_weight}

    def needs(self) -> Needs:
        if self.loss_weight == 0:
            return Needs()
        return Needs(pairing=self.build_pairing, path=PathViews((1.0,), self.share, local_size=True))

    def build_pairing(self) -> TransformPairing:
        return TransformPairing(build_transform("rotation"), "canvas", second=0.0)

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return Toy(dim)


class Toy(Objective):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.predictor = nn.Linear(dim, 1)

    def forward(self, scene: Scene) -> Term:
        views, (cls,) = scene.views, scene.student.tokens[PATH].cls  # [R, D]
        assert views.known.all() and len(cls) == len(views.path_rows)
        error = self.predictor(cls)[:, 0] - views.theta[views.path_rows, 0] / 45
        return Term(error.square().mean(), {"toy_images": torch.tensor(float(len(cls)))})
