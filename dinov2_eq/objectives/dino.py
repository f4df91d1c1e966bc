"""DINO on class tokens: each student view predicts the teacher's output for the other global views.

Caron et al., arXiv 2104.14294. As in DINOv2, this section of the config also holds KoLeo.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.layers.dino_head import DINOHead
from dinov2_eq.objectives.base import Context, Needs, Objective, ObjectiveSettings
from dinov2_eq.objectives.koleo import KoLeo
from dinov2_eq.objectives.targets import build_targets
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, LOCAL, Scene, Term


@dataclass
class HeadConfig(ObjectiveSettings):
    """Settings of a DINO head, inherited by sections that have one."""

    head_n_prototypes: int = setting(65536, "outputs of the head", interval="[1, inf)")
    head_bottleneck_dim: int = setting(256, "width before the prototypes", interval="[1, inf)")
    head_nlayers: int = setting(3, "linear layers before the prototypes", interval="[1, inf)")
    head_hidden_dim: int = setting(2048, "width between these layers", interval="[1, inf)")
    head_norm_last_layer: bool = setting(
        False, "keep the prototypes at norm 1 (DINO, and iBOT for ViT-B); false: their norms are trained (DINOv2)"
    )

    def build_head(self, in_dim: int) -> DINOHead:
        return DINOHead(
            in_dim,
            self.head_n_prototypes,
            nlayers=self.head_nlayers,
            hidden_dim=self.head_hidden_dim,
            bottleneck_dim=self.head_bottleneck_dim,
            norm_last_layer=self.head_norm_last_layer,
        )

    def prototype_caution(self, section: str) -> Iterator[str]:
        """Yields a warning if the head has a single prototype."""
        if self.head_n_prototypes == 1:
            yield (
                f"{section}.head_n_prototypes=1: with one prototype the loss is always 0. Use many, for example 65536"
            )


@dataclass
class DinoConfig(HeadConfig):
    loss_weight: float = setting(1.0, "weight of the DINO term on class tokens; 0: not built", interval="[0, inf)")
    koleo_loss_weight: float = setting(
        0.1,
        "weight of the KoLeo term, which spreads the class tokens of a batch; 0: not built",
        interval="[0, inf)",
    )

    def weights(self) -> dict[str, float]:
        return {"dino": self.loss_weight, "koleo": self.koleo_loss_weight}

    def needs(self) -> Needs:
        if self.loss_weight == 0:
            return Needs()
        return Needs(teacher=True, heads={"dino_head": "dino"}, local_crops=True)

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        if loss == "koleo":
            return KoLeo()
        return Dino(build_targets(context.centering, self.head_n_prototypes))

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        if self.loss_weight > 0:
            yield from self.prototype_caution(section)
        if context.batch_size == 1 and self.koleo_loss_weight > 0:
            yield (
                f"dino.koleo_loss_weight={self.koleo_loss_weight} has no effect with train.batch_size_per_gpu=1: "
                "KoLeo compares the images of a batch. Increase the batch, or set the weight to 0"
            )


class Dino(Objective):
    """The DINO loss with targets by centring or Sinkhorn-Knopp (see `objectives.targets`)."""

    def __init__(self, targets: nn.Module) -> None:
        super().__init__()
        self.targets = targets

    def forward(self, scene: Scene) -> Term:
        student, teacher = scene.student, scene.teacher
        with torch.no_grad():
            teacher_logits = teacher.logits("dino_head", teacher.tokens[GLOBAL].cls)  # [2, B, P]
            probabilities = self.targets(teacher_logits, scene.teacher_temp)
            entropy = torch.special.entr(probabilities).sum(-1).mean()
        views = [student.tokens[name].cls for name in (GLOBAL, LOCAL) if name in student.tokens]
        logits = student.logits("dino_head", torch.cat(views))  # [2 + L, B, P]
        return Term(dino_loss(logits, probabilities), {"teacher_entropy": entropy})

    def end_step(self) -> None:
        self.targets.end_step()


def dino_loss(student_logits: Tensor, teacher_probs: Tensor, student_temp: float = 0.1) -> Tensor:
    """Computes the cross-entropy between each global crop of the teacher and each other crop of the student.

    terms = []
    for g in range(G):
        for v in range(V):
            if v != g:                                            # v < G is the same crop on both sides
                log_probs = log_softmax(student_logits[v] / student_temp)
                terms.append(-(teacher_probs[g] * log_probs).sum(-1).mean())
    return mean(terms)

    Args:
        student_logits: [V, B, P], the G global crops first.
        teacher_probs: [G, B, P], each row sums to 1.

    Raises:
        ValueError: there is only one crop on each side, so no pair.
    """
    num_student, num_teacher, batch = len(student_logits), len(teacher_probs), student_logits.shape[1]
    num_pairs = num_student * num_teacher - min(num_student, num_teacher)
    if not num_pairs:
        raise ValueError("dino_loss compares different crops of an image, and 1 crop was given on both sides; give 2")
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)  # [V, B, P]
    with torch.autocast(student_logits.device.type, enabled=False):
        products = torch.einsum("gbp,vbp->gv", teacher_probs.float(), log_probs)  # [G, V]
    same_crop = torch.eye(num_teacher, num_student, dtype=torch.bool, device=products.device)
    return -products.masked_fill(same_crop, 0.0).sum() / (num_pairs * batch)
