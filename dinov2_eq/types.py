"""What is handed from one floor of the code to the next.

Shape letters: B batch, C channels, H and W height and width, V views of one group (2 global crops, L local crops),
N patches, D feature size, A parameters of the transform g, F fractions of theta. The view axis always comes first.
"""

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

if TYPE_CHECKING:  # models of torch.hub need torch alone
    from PIL import Image


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


GLOBAL, LOCAL, PATH = "global", "local", "path"  # names of groups of views, see `ViewBatch`


class PathViews(NamedTuple):
    """Views at fractions of theta that the student encodes for one objective alone."""

    fractions: tuple[float, ...]
    share: float = 1.0  # of the images
    local_size: bool = False  # the size of the local crops; False: of the global crops
    with_base: bool = False  # the objective also reads the second global view of these images, so that has no mask


class ImagePair(NamedTuple):
    """Two images of one scene, such as renderings of an object in two poses."""

    first: "Image.Image"  # RGB; the anchor view and the local crops are cut from it
    second: "Image.Image"  # RGB; becomes the second global view
    theta: Tensor | None  # [A] what leads from the first to the second; None: nobody knows


class Drawn(NamedTuple):
    """What links the second global view of one image to its base view."""

    theta: Tensor  # [A] parameters of the transform; A = 0 where there is none
    known: bool  # whether objectives may use theta


class Sample(NamedTuple):
    """One image as a worker hands it over: crops in uint8 and every random number it will need."""

    position: int  # place in the endless stream of samples, the same on any number of processes
    anchor_crop: Tensor  # [C, H, W] uint8, becomes the anchor view v1
    base_canvas: Tensor  # [C, Hc, Wc] uint8, its centre becomes the base view u
    local_crops: Tensor  # [L, C, h, w] uint8
    photometric: PhotometricParams  # leading axis 2 + L: anchor, base, local crops
    drawn: Drawn
    skipped: tuple[str, ...]  # the unreadable images that this one replaces, with what is wrong


class CollatedBatch(NamedTuple):
    """A batch of `Sample`s, still uint8, plus the masks."""

    anchor_crops: Tensor  # [B, C, H, W] uint8
    base_canvases: Tensor  # [B, C, Hc, Wc] uint8
    local_crops: Tensor  # [L, B, C, h, w] uint8, L may be 0
    photometric: PhotometricParams  # leading axes [2 + L, B]
    theta: Tensor  # [B, A]
    known: Tensor  # [B] bool
    path_rows: Tensor  # [R] int64, the images whose path is encoded as views of its own; R may be 0
    masks: Tensor  # [2, B, N] bool, True where the student does not see the patch; N = 0 where nothing is masked
    masked_patches: Tensor  # [M] int64, the places of True in the flattened masks
    skipped: tuple[str, ...]


class Group(NamedTuple):
    """Views of one size, which a network encodes together."""

    images: Tensor  # [V, B, C, H, W], augmented and normalised
    masks: Tensor | None = None  # [V, B, N] bool, True where the student does not see the patch; None: it sees all
    masked: Tensor | None = None  # [M] int64, the places of True in the flattened masks


class ViewBatch(NamedTuple):
    """What the networks see and what the objectives compare with, on the device.

    Groups of views by name: "global" holds the anchor view v1, then the second view (v2 = g_theta(u), or u); "local"
    the local crops, where an objective needs them; "path" g at the requested fractions of theta on the base views of
    `path_rows`, where an objective wants the student to encode these. Targets then have the rows and the size of that
    group.
    """

    groups: dict[str, Group]
    theta: Tensor  # [B, A]
    known: Tensor  # [B] bool
    targets: Tensor  # [F, B or R, C, H, W] g at fractions of theta on u, as pixels; F = 0 where nobody needs them
    path_rows: Tensor  # [R] int64


class CropTokens(NamedTuple):
    """Normalised tokens of all views of one group."""

    cls: Tensor  # [V, B, D]
    patches: Tensor  # [V, B, N, D]


class NetworkOutput(NamedTuple):
    """Tokens of one side (student or teacher), and the modules of that side to read them with.

    An objective projects only the tokens that it needs: iBOT the masked patches, the decoders all patches.
    """

    tokens: dict[str, CropTokens]  # by group; the teacher sees the global group only
    modules: nn.ModuleDict  # "projection" and the heads

    def invariant(self, tokens: Tensor) -> Tensor:
        """Returns what the base losses see of tokens [..., D]: the tokens, or a projection z_inv [..., D_inv]."""
        return self.modules["projection"].invariant(tokens)

    def equivariant(self, tokens: Tensor) -> Tensor:
        """Projects tokens [..., D] to z_equi [..., D_equi], which is all that the decoders see."""
        return self.modules["projection"].equivariant(tokens)

    def logits(self, head: str, tokens: Tensor) -> Tensor:
        """Returns the prototype logits [..., P] of a head for the invariant part of tokens [..., D]."""
        return self.modules[head](self.invariant(tokens))


class Scene(NamedTuple):
    """Everything that an objective may read."""

    views: ViewBatch
    student: NetworkOutput
    teacher: NetworkOutput | None  # None where no objective needs it
    teacher_temp: float  # temperature of the teacher's targets at this step


class Term(NamedTuple):
    """What an objective returns."""

    loss: Tensor  # scalar, unweighted
    metrics: dict[str, Tensor]  # detached scalars worth logging


class StepOutput(NamedTuple):
    """One forward of the whole method."""

    total: Tensor  # weighted sum of the losses
    losses: dict[str, Tensor]  # unweighted, by objective
    metrics: dict[str, Tensor]
    cls: Tensor  # [V * B, D] class tokens of the global views, to judge how many directions the features fill
