"""SIE: one half of the representation is invariant, and theta predicts how the other half moves.

Garrido, Najman, LeCun, *Self-supervised learning of Split Invariant Equivariant representations*, arXiv 2302.10283.
Two views x and y, of which theta leads from x to y (see `linked`), are expanded half by half, z = [z_inv, z_equi]. A
hypernetwork without a bias makes a matrix of theta, p = W(theta) x_equi:

L = s MSE(x_inv, y_inv) + e MSE(p, y_equi) + v (V(x) + V(y)) / 2 + v' V(p) + c (C(x) + C(y))

with VICReg's V and C, of the whole z: the two halves must not repeat each other. Defaults are the coefficients of the
authors' published runs. Without V(p): predicted_variance_coefficient=0. Only equivariant: equivariant_share=1 and
prediction_coefficient=10.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.distributed import gather_rows, gather_rows_with_gradient
from dinov2_eq.layers.projector import build_projector
from dinov2_eq.objectives.base import Context, Objective, caution_of_single_images
from dinov2_eq.objectives.linked import DATA, LinkedSettings, LinkReader, mean_of_known
from dinov2_eq.objectives.vicreg import EPS, TARGET_STD, spread_terms
from dinov2_eq.settings import setting
from dinov2_eq.types import Scene, Term

LARGEST_PHI = 3 / 4 * math.pi  # of `encode_on_circles`


@dataclass
class SieConfig(LinkedSettings):
    loss_weight: float = setting(0.0, "weight of the SIE term; 0: not built", interval="[0, inf)")
    invariance_coefficient: float = setting(
        10.0, "weight of the squared error between the invariant parts of the views", interval="[0, inf)"
    )
    prediction_coefficient: float = setting(
        4.5, "weight of the squared error of the predicted equivariant part", interval="[0, inf)"
    )
    variance_coefficient: float = setting(
        10.0, "weight of the hinge on standard deviations below 1", interval="[0, inf)"
    )
    predicted_variance_coefficient: float = setting(
        5.0, "weight of this hinge for the predicted equivariant part", interval="[0, inf)"
    )
    covariance_coefficient: float = setting(1.0, "weight of the squared covariances", interval="[0, inf)")
    equivariant_share: float = setting(
        0.5, "share of the representation, its last channels, that is equivariant; 1: all of it", interval="(0, 1]"
    )
    expander_dim: int = setting(2048, "width of the layers of both expanders together", interval="[1, inf)")

    def weights(self) -> dict[str, float]:
        return {"sie": self.loss_weight}

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return SIE(self, self.reader(context), dim)

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        yield from super().cautions(section, context)
        if self.is_built():
            yield from caution_of_single_images(section, context, "variances are over one image of each process")


class SIE(Objective):
    """The invariant part of v1 and y agrees, and theta leads from the equivariant part of x to that of y.

    On pairs of images v1 is x, as in the paper. With a transform g, x = u; then z of the first view is
    [inv(v1), equi(u)], so that the invariant part learns what all crops have in common.
    """

    def __init__(self, settings: SieConfig, reader: LinkReader, dim: int) -> None:
        super().__init__()
        self.settings = settings
        self.read = reader
        self.encode = encode_as_given if settings.transform == DATA else encode_on_circles
        equivariant = max(round(settings.equivariant_share * dim), 1)
        width = max(round(settings.equivariant_share * settings.expander_dim), 1)
        self.invariant_dim = dim - equivariant
        if self.invariant_dim:
            self.invariant_expander = build_projector([self.invariant_dim, *[settings.expander_dim - width] * 3])
        self.equivariant_expander = build_projector([equivariant, *[width] * 3])
        num_codes = self.encode(torch.zeros(1, len(reader.columns))).shape[1]
        self.predictor = Hypernetwork(num_codes, width)

    def forward(self, scene: Scene) -> Term:
        linked, inv = self.read(scene), self.invariant_dim
        x_inv = y_inv = linked.first[:, :0]
        if inv:
            x_inv, y_inv = self.invariant_expander(torch.cat([linked.first, linked.target])[:, :inv]).chunk(2)
        x_equi, y_equi = self.equivariant_expander(torch.cat([linked.source, linked.target])[:, inv:]).chunk(2)
        predicted = self.predictor(x_equi, self.encode(linked.theta))
        terms = sie_terms(x_inv, x_equi, y_inv, y_equi, predicted, linked.known)
        settings = self.settings
        loss = (
            settings.invariance_coefficient * terms.invariance
            + settings.prediction_coefficient * terms.prediction
            + settings.variance_coefficient * terms.variance
            + settings.predicted_variance_coefficient * terms.predicted_variance
            + settings.covariance_coefficient * terms.covariance
        )
        return Term(loss, {f"sie_{name}": value.detach() for name, value in terms._asdict().items()})


class Hypernetwork(nn.Module):
    """W(theta) z with W(theta) = sum_k code_k M_k, linear in the code of theta and without a bias.

    Without a bias W cannot be the same for all theta, which would make the equivariant part invariant. At the start
    W(theta) z is about as large as z. With the authors' initial weights it is 16 times larger at a width of 1024: their
    layer has theta as its input, so that torch draws weights for 4 inputs.

    Args:
        num_codes: K.
        dim: of z.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.matrices = nn.Linear(dim, num_codes * dim, bias=False)  # all M_k, one above the other

    def forward(self, embedding: Tensor, code: Tensor) -> Tensor:
        products = self.matrices(embedding).unflatten(-1, (code.shape[-1], -1))  # [B, K, D], M_k z
        return (code[..., None] * products).sum(dim=1)


def encode_as_given(theta: Tensor) -> Tensor:
    """Returns theta of the data itself: a unit quaternion is never 0, so W can be the identity for no rotation."""
    return theta


def encode_on_circles(theta: Tensor) -> Tensor:
    """Encodes numbers in [-1, 1] by cosine and sine of phi = 135 degrees times the number: [B, A] -> [B, 2 A].

    The paper has quaternions only. Numbers of g are 0 in the middle of their range, where W must not be 0. With 135
    degrees the ends of the range stay apart, and no W is nearly the same for all theta: the best constant misses 0.77
    of its square for one number, and 0.30 for eight. With 90 degrees it would miss 0.19 and 0.03; with the quaternions
    of 3DIEBench it misses 0.24.
    """
    phi = LARGEST_PHI * theta
    return torch.cat([phi.cos(), phi.sin()], dim=-1)


class SieTerms(NamedTuple):
    """Scalars in float32."""

    invariance: Tensor
    prediction: Tensor
    variance: Tensor
    predicted_variance: Tensor
    covariance: Tensor


def sie_terms(
    x_inv: Tensor, x_equi: Tensor, y_inv: Tensor, y_equi: Tensor, predicted: Tensor, known: Tensor
) -> SieTerms:
    """Returns the terms in float32, over the images of all processes.

    invariance = mean((x_inv - y_inv) ** 2)
    prediction = mean((predicted - y_equi) ** 2 of the known pairs)
    variance, covariance = those of VICReg for [x_inv, x_equi] and [y_inv, y_equi]
    predicted_variance = mean(max(0, 1 - sqrt(var(predicted[known, d]) + 1e-4)) for d)

    Without known pairs prediction is 0, with fewer than two predicted_variance.

    Args:
        x_inv, y_inv: [B, D_inv] of this process's images; D_inv = 0 gives an invariance of 0.
        x_equi, y_equi, predicted: [B, D_equi].
        known: [B], 1 where theta is known, else 0.
    """
    with torch.autocast(x_equi.device.type, enabled=False):
        x_inv, x_equi, y_inv, y_equi, predicted = (z.float() for z in (x_inv, x_equi, y_inv, y_equi, predicted))
        invariance = F.mse_loss(x_inv, y_inv) if x_inv.numel() else x_inv.sum()
        prediction = mean_of_known((predicted - y_equi).square().mean(dim=1), known)
        variance, covariance = spread_terms(torch.cat([x_inv, x_equi], dim=1), torch.cat([y_inv, y_equi], dim=1))
        return SieTerms(invariance, prediction, variance, variance_of_known(predicted, known), covariance)


def variance_of_known(own: Tensor, known: Tensor) -> Tensor:
    """Returns VICReg's variance term of the rows of all processes where theta is known; 0 if there are fewer than two.

    Args:
        own: [B, D], the rows of this process.
        known: [B], 1 or 0.
    """
    rows, weights = gather_rows_with_gradient(own), gather_rows(known)[:, None]  # [N, D], [N, 1]
    count = weights.sum()
    centred = weights * (rows - (weights * rows).sum(dim=0) / count.clamp(min=1))
    std = torch.sqrt(centred.square().sum(dim=0) / (count - 1).clamp(min=1) + EPS)
    return F.relu(TARGET_STD - std).mean() * (count > 1)
