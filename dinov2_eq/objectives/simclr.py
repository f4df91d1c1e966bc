"""SimCLR: two views of an image attract each other, all other views of the global batch repel (NT-Xent).

Chen et al., arXiv 2002.05709, equation 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.distributed import gather_rows, gather_rows_with_gradient, get_rank
from dinov2_eq.layers.projector import build_projector
from dinov2_eq.objectives.base import Context, Needs, Objective, ObjectiveSettings, caution_of_single_images
from dinov2_eq.objectives.linked import mean_of_known
from dinov2_eq.objectives.pooling import POOLS, pooled
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, Scene, Term


@dataclass
class SimclrConfig(ObjectiveSettings):
    loss_weight: float = setting(0.0, "weight of the NT-Xent term; 0: not built", interval="[0, inf)")
    temperature: float = setting(0.2, "divides the cosines before the softmax", interval="(0, inf)")
    pool: str = setting("cls", "what the projector sees: the class token, or the mean patch token", choices=POOLS)
    projector_hidden_dim: int = setting(2048, "width of the projector's two hidden layers", interval="[1, inf)")
    projector_out_dim: int = setting(256, "width of the projector's output", interval="[1, inf)")

    def weights(self) -> dict[str, float]:
        return {"simclr": self.loss_weight}

    def needs(self) -> Needs:
        return Needs()

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        return SimCLR(self, dim)

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        if self.loss_weight > 0:
            yield from caution_of_single_images(section, context, "only other processes give negatives")


class SimCLR(Objective):
    """NT-Xent between the projected global views."""

    def __init__(self, settings: SimclrConfig, dim: int) -> None:
        super().__init__()
        self.pool, self.temperature = settings.pool, settings.temperature
        hidden = settings.projector_hidden_dim
        self.projector = build_projector([dim, hidden, hidden, settings.projector_out_dim])

    def forward(self, scene: Scene) -> Term:
        features = scene.student.invariant(pooled(scene.student.tokens[GLOBAL], self.pool))  # [2, B, D]
        first, second = self.projector(features.flatten(0, 1)).chunk(2)
        return Term(nt_xent(first, second, self.temperature), {})


def nt_xent(first: Tensor, second: Tensor, temperature: float, known: Tensor | None = None) -> Tensor:
    """Computes NT-Xent: cross-entropy of each view's partner among all other views of all processes, in float32.

    u = normalize(concatenate(first, second))                 # [2N, D], partner of i is i + N or i - N
    loss = 0
    for i in range(2N):
        scores = [u[i] @ u[k] / temperature for k in range(2N) if k != i]
        loss += log(sum(exp(scores))) - u[i] @ u[partner(i)] / temperature
    return loss / 2N

    Args:
        first, second: [B, D] of this process's images; N is their number on all processes. The mean runs over the
            views of this process.
        known: [B], 1 for the images that take part, 0 for the others, as if these were not in the batch; without any
            the loss is 0. None: all take part.
    """
    with torch.autocast(first.device.type, enabled=False):
        own = F.normalize(torch.stack([first, second]).float(), dim=-1)  # [2, B, D]
        batch = own.shape[1]
        everyone = gather_rows_with_gradient(own.transpose(0, 1)).transpose(0, 1)  # [2, N, D]
        scores = own.flatten(0, 1) @ everyone.flatten(0, 1).T / temperature  # [2B, 2N]
        total = everyone.shape[1]
        places = get_rank() * batch + torch.arange(batch, device=own.device)  # of this process's images
        selves, partners = torch.cat([places, places + total]), torch.cat([places + total, places])
        scores = scores.scatter(1, selves[:, None], -torch.inf)
        if known is None:
            return F.cross_entropy(scores, partners)
        takes_part = known.repeat(2)  # [2B]
        scores = scores.masked_fill(gather_rows(known).repeat(2) == 0, -torch.inf)
        scores = scores.masked_fill(takes_part[:, None] == 0, 0.0)  # finite, so that their gradient is 0
        return mean_of_known(F.cross_entropy(scores, partners, reduction="none"), takes_part)
