from dinov2_eq.loss.dino_clstoken_loss import centered_softmax, dino_loss, sinkhorn_knopp
from dinov2_eq.loss.ibot_patch_loss import ibot_loss
from dinov2_eq.loss.koleo_loss import koleo_loss

__all__ = ["centered_softmax", "dino_loss", "ibot_loss", "koleo_loss", "sinkhorn_knopp"]
