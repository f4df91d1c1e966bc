"""iBOT: the student predicts the teacher's output for the patches that are masked from the student.

Zhou et al., arXiv 2111.07832.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.data.masking import ever_masks
from dinov2_eq.objectives.base import Context, MaskNeed, Needs, Objective
from dinov2_eq.objectives.dino import HeadConfig
from dinov2_eq.objectives.targets import build_targets
from dinov2_eq.settings import LOW_HIGH, setting
from dinov2_eq.types import GLOBAL, Scene, Term

NUM_MASKS = 256  # trials to check whether any patch is ever masked


@dataclass
class IbotConfig(HeadConfig):
    loss_weight: float = setting(
        1.0, "weight of the iBOT term on masked patch tokens; 0: not built, nothing is masked", interval="[0, inf)"
    )
    mask_sample_probability: float = setting(0.5, "share of the global crops that get a mask", interval="[0, 1]")
    mask_ratio_min_max: list[float] = setting(
        [0.1, 0.5], "share of the patches that a mask hides", interval="[0, 1]", elements=LOW_HIGH
    )
    separate_head: bool = setting(
        False, "false: shares the DINO head; true: a head of its own, sized by the head_* keys of this section"
    )

    center_patches: str = setting(
        "masked", "patches whose logits move the centre: masked (DINOv2), or all (iBOT)", choices=("masked", "all")
    )

    def weights(self) -> dict[str, float]:
        return {"ibot": self.loss_weight}

    def needs(self) -> Needs:
        if self.loss_weight == 0:
            return Needs()
        heads = {"ibot_head": "ibot"} if self.separate_head else {"dino_head": "dino"}
        masks = MaskNeed(tuple(self.mask_ratio_min_max), self.mask_sample_probability)
        return Needs(teacher=True, heads=heads, masks=masks)

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        ((head, section),) = self.needs().heads.items()
        targets = build_targets(context.centering, context.sections[section].head_n_prototypes)
        return Ibot(targets, head, self.center_patches)

    def problems(self, section: str, context: Context) -> Iterator[str]:
        share, num_crops = self.mask_sample_probability, 2 * context.step_images
        if self.loss_weight > 0 and 0 <= share <= 1 and num_crops > 0 and int(num_crops * share) == 0:
            yield (
                f"ibot.mask_sample_probability={share} masks none of the {num_crops} global crops of a step, so iBOT "
                f"has nothing to learn from; raise it above 1/{num_crops}, enlarge the batch, or set ibot.loss_weight=0"
            )

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        if self.loss_weight == 0:
            return
        if not ever_masks(context.grid, self.mask_ratio_min_max, NUM_MASKS, context.seed):
            height, width = context.grid
            yield (
                f"iBOT learns almost nothing: no patch was masked in {NUM_MASKS} trial masks with "
                f"ibot.mask_ratio_min_max={self.mask_ratio_min_max} of the {height} x {width} patches of a global "
                "crop. Raise it, use larger crops or smaller patches, or set ibot.loss_weight=0"
            )
        for owner in self.needs().heads.values():
            if owner == section or context.sections[owner].loss_weight == 0:  # else that section warns
                yield from context.sections[owner].prototype_caution(owner)


class Ibot(Objective):
    """The iBOT loss on masked patches.

    Args:
        targets: see `objectives.targets`.
        head: "ibot_head", or "dino_head" if the two terms share a head.
        center_patches: "masked" or "all", the patches whose logits move the centre.
    """

    def __init__(self, targets: nn.Module, head: str, center_patches: str = "masked") -> None:
        super().__init__()
        self.center_patches = center_patches
        self.targets = targets
        self.head = head

    def forward(self, scene: Scene) -> Term:
        masks, masked = scene.views.groups[GLOBAL].masks, scene.views.groups[GLOBAL].masked  # [2, B, N], [M]
        weights = 1 / masks.sum(-1, keepdim=True).clamp(min=1)  # [2, B, 1]: every masked crop counts the same
        weights = weights.expand(masks.shape).flatten()[masked]  # [M]
        hidden, patches = (side.tokens[GLOBAL].patches.flatten(0, 2) for side in (scene.student, scene.teacher))
        with torch.no_grad():
            if self.center_patches == "all":
                seen = scene.teacher.logits(self.head, patches)  # [2 B N, P]
                probabilities = self.targets(seen[masked], scene.teacher_temp, seen)
            else:
                probabilities = self.targets(scene.teacher.logits(self.head, patches[masked]), scene.teacher_temp)
        logits = scene.student.logits(self.head, hidden[masked])  # [M, P]
        return Term(ibot_loss(logits, probabilities, weights, num_crops=masks.shape[0] * masks.shape[1]), {})

    def end_step(self) -> None:
        self.targets.end_step()


def ibot_loss(
    student_logits: Tensor, teacher_probs: Tensor, weights: Tensor, num_crops: int, student_temp: float = 0.1
) -> Tensor:
    """Computes the cross-entropy on each masked patch, averaged within its crop, then over all crops, masked or not.

    loss = 0
    for i in range(M):
        log_probs = log_softmax(student_logits[i] / student_temp)
        loss -= weights[i] * (teacher_probs[i] * log_probs).sum()
    return loss / num_crops

    Args:
        student_logits: [M, P] of the masked patches; M = 0 gives 0, and the gradient is 0.
        teacher_probs: [M, P] of the same patches, seen unmasked.
        weights: [M], 1 / (number of masked patches in the same crop).
        num_crops: number of global crops, those without a mask included.
    """
    log_probs = F.log_softmax(student_logits.float() / student_temp, dim=-1)
    cross_entropy = -(teacher_probs.float() * log_probs).sum(dim=-1)  # [M]
    return (weights.float() * cross_entropy).sum() / num_crops
