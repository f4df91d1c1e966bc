"""What is handed from one floor of the code to the next.

Shape letters: B batch, C channels, H and W height and width, G global crops (2), L local crops, K intermediate
targets, N patches, D feature size, P parameters of the transform. The crop axis always comes first.
"""

from typing import NamedTuple

from torch import Tensor, nn


class PhotometricParams(NamedTuple):
    """One draw of the photometric augmentation for every view; identity values mean "not applied"."""

    brightness: Tensor  # [...] factor, 1 is the identity
    contrast: Tensor  # [...] factor, 1 is the identity
    saturation: Tensor  # [...] factor, 1 is the identity
    hue: Tensor  # [...] shift in turns, in [-0.5, 0.5], 0 is the identity
    order: Tensor  # [..., 4] int64 permutation of (brightness, contrast, saturation, hue)
    grey: Tensor  # [...] bool
    blur_sigma: Tensor  # [...] pixels, 0 is the identity
    solarize: Tensor  # [...] bool


class Sample(NamedTuple):
    """One image as a worker hands it over: crops in uint8 and every random number it will need."""

    position: int  # place in the endless stream of samples, the same on any number of processes
    anchor_crop: Tensor  # [C, H, W] uint8, becomes the anchor view v1
    base_canvas: Tensor  # [C, Hc, Wc] uint8, its centre becomes the base view u
    local_crops: Tensor  # [L, C, h, w] uint8
    photometric: PhotometricParams  # leading axis 2 + L: anchor, base, local crops
    theta: Tensor  # [P] parameters of the transform g; P = 0 without the task
    skipped: tuple[str, ...]  # the unreadable images that this one replaces, with what is wrong


class CollatedBatch(NamedTuple):
    """A batch of `Sample`s, still uint8, plus the masks."""

    step_position: int  # position of the first sample
    anchor_crops: Tensor  # [B, C, H, W] uint8
    base_canvases: Tensor  # [B, C, Hc, Wc] uint8
    local_crops: Tensor  # [L, B, C, h, w] uint8, L may be 0
    photometric: PhotometricParams  # leading axes [2 + L, B]
    theta: Tensor  # [B, P]
    masks: Tensor  # [G, B, N] bool, True where the student does not see the patch
    skipped: tuple[str, ...]


class ViewBatch(NamedTuple):
    """What the networks see: augmented, transformed and normalised images on the device."""

    global_crops: Tensor  # [G, B, C, H, W]: the anchor view v1, then the transformed view v2 (or u without the task)
    local_crops: Tensor  # [L, B, C, h, w], L may be 0
    masks: Tensor  # [G, B, N] bool
    intermediate_targets: Tensor  # [K, B, C, H, W], K = 0 where nothing is reconstructed


class CropTokens(NamedTuple):
    """Normalised tokens of all crops of one size."""

    cls: Tensor  # [V, B, D]
    patches: Tensor  # [V, B, N, D]


class NetworkOutput(NamedTuple):
    """Tokens of one side (student or teacher), and the modules of that side to read them with.

    An objective projects only the tokens that it needs: iBOT the masked patches, the decoders all patches.
    """

    global_crops: CropTokens  # V = G
    local_crops: CropTokens | None  # V = L; None for the teacher and where there are no local crops
    modules: nn.ModuleDict  # "projection" and the heads

    def invariant(self, tokens: Tensor) -> Tensor:
        """z_inv, [..., D] -> [..., D_inv]: all that the base losses see."""
        return self.modules["projection"].invariant(tokens)

    def equivariant(self, tokens: Tensor) -> Tensor:
        """z_equi, [..., D] -> [..., D_equi]: all that the decoders see."""
        return self.modules["projection"].equivariant(tokens)

    def logits(self, head: str, tokens: Tensor) -> Tensor:
        """Prototype logits of a head for the invariant part, [..., D] -> [..., P]."""
        return self.modules[head](self.invariant(tokens))


class Term(NamedTuple):
    """What an objective returns."""

    loss: Tensor  # scalar, unweighted
    metrics: dict[str, Tensor]  # detached scalars worth logging


class StepOutput(NamedTuple):
    """One forward of the whole method."""

    total: Tensor  # weighted sum of the losses
    losses: dict[str, Tensor]  # unweighted, by objective
    metrics: dict[str, Tensor]
    teacher_cls: Tensor  # [G * B, D], to judge how many directions the features fill
