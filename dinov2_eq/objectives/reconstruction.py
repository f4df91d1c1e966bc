"""The equivariance task: rebuild K images between u and g_theta(u) from the equivariant tokens of two views.

L_recon = (1 / K) sum_k mean((u_hat_k - u_k)^2), k = 1..K (Wang et al., arXiv 2503.18753, section 3).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_eq.equivariance.decoders import DECODERS, HEAD_DIM, build_decoder
from dinov2_eq.objectives.base import Context, Needs, Objective
from dinov2_eq.objectives.transformed import TransformSettings
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, LOCAL, PATH, PathViews, Scene, Term


@dataclass
class EquivarianceConfig(TransformSettings):
    enabled: bool = setting(True, "false: nothing of the task is built and the run is the plain base method")
    loss_weight: float = setting(
        10.0,
        "lambda in the total loss; 0: the control, which has the same views and reconstructs nothing",
        interval="[0, inf)",
    )
    gradient_share: float | None = setting(
        None,
        "share of the gradient on the student's tokens that comes from the task, whatever its loss_weight above 0 is; "
        "null: loss_weight decides",
        interval="(0, 1)",
    )
    gradient_share_end: float | None = setting(
        None, "that share at the last step; it moves linearly. null: it does not move", interval="(0, 1)"
    )
    view: str = setting(
        "third",
        "which view g transforms: third: the base losses see v1 and u, and g(u) is a view of its own, which the "
        "decoders read together with u; or second (the papers: all losses see v1 and g(u))",
        choices=("third", "second"),
    )
    third_view_share: float = setting(0.5, "share of the images that get a third view", interval="(0, 1]")
    third_view_size: str = setting(
        "global",
        "size of the third view: global, or local: u and g(u) are shrunk to the size of a local crop",
        choices=(GLOBAL, LOCAL),
    )
    num_intermediates: int = setting(
        2, "K: targets strictly between the base and the transformed view", interval="[0, inf)"
    )
    patch_dim: int = setting(
        2048, "d_patch: width of the token projection, if there is an invariant one", interval="[1, inf)"
    )
    invariant_projection: bool = setting(
        False,
        "false: base losses see the whole token, as without the task; true: they see a projection of it to patch_dim - "
        "equivariant_dim channels (the papers)",
    )
    equivariant_dim: int = setting(
        512, "d_equi: channels of each projected token that only the decoders see", interval="[1, inf)"
    )
    decoder: str = setting("self_attention", "architecture of the decoders", choices=tuple(DECODERS))
    decoder_dim: int = setting(256, "width of the decoder after its first layer", interval="[1, inf)")
    decoder_depth: int = setting(1, "self-attention layers of the decoders that have them", interval="[0, inf)")

    def is_used(self) -> bool:
        return self.enabled

    def weights(self) -> dict[str, float]:
        return {"reconstruction": self.loss_weight if self.enabled else 0.0}

    def gradient_shares(self) -> dict[str, tuple[float, float]]:
        start, end = self.gradient_share, self.gradient_share_end
        return {} if start is None else {"reconstruction": (start, start if end is None else end)}

    def needs(self) -> Needs:
        if not self.enabled:
            return Needs()
        rebuilds = self.loss_weight > 0
        return Needs(
            pairing=self.pairing(second=0.0 if self.view == "third" else 1.0),
            split=(self.patch_dim - self.equivariant_dim if self.invariant_projection else None, self.equivariant_dim),
            targets=self.fractions() if rebuilds else (),
            shown=self.fractions(),
            path=self.third_view() if rebuilds and self.view == "third" else None,
        )

    def third_view(self) -> PathViews:
        """Returns what the student encodes for the decoders alone: g(u), and u itself where that is of another size."""
        if self.third_view_size == LOCAL:
            return PathViews((0.0, 1.0), self.third_view_share, local_size=True)
        return PathViews((1.0,), self.third_view_share, with_base=True)

    def fractions(self) -> tuple[float, ...]:
        """Returns k / (K + 1) for k = 1..K: where on the way from u to g_theta(u) the targets lie."""
        steps = self.num_intermediates + 1
        return tuple(step / steps for step in range(1, steps))

    def build(self, loss: str, context: Context, dim: int) -> Objective:
        decoders = [
            build_decoder(
                self.decoder,
                equivariant_dim=self.equivariant_dim,
                patch_size=context.patch_size,
                dim=self.decoder_dim,
                depth=self.decoder_depth,
                attention=context.attention,
            )
            for _ in range(self.num_intermediates)
        ]
        third_share = self.third_view_share if self.view == "third" else None
        return Reconstruction(decoders, context.patch_size, third_share)

    def problems(self, section: str, context: Context) -> Iterator[str]:
        if self.invariant_projection and self.equivariant_dim >= self.patch_dim:
            yield (
                f"equivariance.equivariant_dim={self.equivariant_dim} must be less than "
                f"equivariance.patch_dim={self.patch_dim}, or nothing is left for the base losses"
            )
        side = self.third_view_size if self.view == "third" else GLOBAL
        size, patch_size = context.crop_sizes.get(side, 0), context.patch_size  # 0: not one of the choices
        if self.loss_weight > 0 and size % patch_size:
            yield (
                f"crops.{side}_crops_size={size} is not made of whole patches of {patch_size} pixels, which the "
                f"decoders rebuild; the nearest is {max(round(size / patch_size), 1) * patch_size}"
            )
        if self.num_intermediates == 0:
            yield (
                "equivariance.num_intermediates=0 must be at least 1; "
                "for a run without reconstruction set equivariance.loss_weight=0 or equivariance.enabled=false"
            )
        if self.gradient_share is None and self.gradient_share_end is not None:
            yield (
                f"equivariance.gradient_share_end={self.gradient_share_end} needs equivariance.gradient_share, the "
                "share at the first step"
            )
        if self.decoder != "conv" and self.decoder_dim % HEAD_DIM:
            yield (
                f"equivariance.decoder_dim={self.decoder_dim} must be a multiple of {HEAD_DIM}, "
                f"the width of a head, for equivariance.decoder={self.decoder}"
            )


class Reconstruction(Objective):
    """The mean error of K independent decoders, one for each intermediate target.

    Args:
        decoders: see `equivariance.decoders`.
        patch_size: pixels.
        third_share: of the images, those with a third view, whose targets are rebuilt; None: g moves the second view of
            all images.
    """

    def __init__(self, decoders: Sequence[nn.Module], patch_size: int, third_share: float | None = None) -> None:
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.patch_size = patch_size
        self.third_share = third_share

    def forward(self, scene: Scene) -> Term:
        loss = reconstruction_loss(self.reconstruct(scene), scene.views.targets)
        # A forward of few images rebuilds more or fewer of them than their share. With this weight each rebuilt image
        # counts the same, and any number of forwards and processes gives the gradient of one.
        rebuilt, expected = scene.views.targets.shape[1], (self.third_share or 1.0) * len(scene.views.theta)
        return Term(loss * (rebuilt / expected), {})

    def reconstruct(self, scene: Scene) -> Tensor:
        """Returns u_hat_k for k = 1..K, [K, R, 3, H, W] in normalised pixel values."""
        height, width = scene.views.targets.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        first, second = scene.student.equivariant(self.pair(scene))  # each [R, N, D_equi]
        return torch.stack([decoder(first, second, grid) for decoder in self.decoders])

    def pair(self, scene: Scene) -> Tensor:
        """Returns the patch tokens that the decoders read, [2, R, N, D]: of v1 and g(u), or of u and a third view."""
        patches = scene.student.tokens[GLOBAL].patches  # [2, B, N, D]
        if self.third_share is None:
            return patches
        path = scene.student.tokens[PATH].patches  # of g(u), or of u and g(u)
        return path if len(path) == 2 else torch.stack([patches[1, scene.views.path_rows], path[0]])

    def pictures(self, scene: Scene) -> dict[str, Tensor]:
        return {"reconstructions": self.reconstruct(scene)}


def reconstruction_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the K intermediate targets, in float32.

    Both are [K, B, C, H, W]; B = 0 gives 0, and the gradient is 0. The mean runs over images, channels and pixels, and
    the targets are normalised with the data's mean and standard deviation: predicting the mean colour everywhere costs
    about 1, whatever K and the image size are. That fixes the meaning of lambda: at lambda = 1 a useless decoder weighs
    as much as one nat of the base losses, which are cross-entropies of several nats.

        loss = 0
        for k in range(K):                       # one decoder for each intermediate target
            loss += mse(predicted[k], target[k])
        return loss / K
    """
    if not predicted.numel():
        return predicted.float().sum()
    return F.mse_loss(predicted.float(), target.float())
