"""Features of images I and of transformed images g(I), for several transforms and borders in one pass over the data.

What enters at the border can reveal a geometric transform, so each is measured three times: "zeros" (black enters, as
in the papers), "masked" (the same, but only a disc that no border pixel can reach is shown), "canvas" (I is the centre
of a larger image, so that real pixels enter). Other transforms: "none" and, for comparison, "masked".

The processes share the images equally, and all of them get all features.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Subset

from dinov2_eq.data.datasets import ImageDataset
from dinov2_eq.data.loaders import EvaluationSamples, read_to_evaluate, resize_and_crop
from dinov2_eq.data.workers import Loader
from dinov2_eq.distributed import gather_rows
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.evaluation.encoder import Encoder
from dinov2_eq.logging import progress_bar
from dinov2_eq.probes.features import EQUIVARIANT_MODES, MODES, WIDTHS, even_share, pooled_parts, require_finite


class Appearance(NamedTuple):
    """Side and mask of the image I, apart from g."""

    side: int  # of the image as it is read, in pixels; I is its centre
    mask_radius: float | None  # of the disc that is shown, in pixels; None: everything is shown


class Setting(NamedTuple):
    """One transform with one kind of border."""

    task: str
    border: str  # zeros, masked, canvas or none
    transform: Transform
    appearance: Appearance


def settings_of(task: str, transform: Transform, image_size: int) -> list[Setting]:
    """Returns a setting for each border that a transform is measured with.

    Raises:
        ValueError: the shifts are so large that no disc is left.
    """
    (canvas_side, _) = transform.canvas_size((image_size, image_size))
    limits = dict(zip(transform.components, transform.high.tolist(), strict=True))
    shifts = limits.get("shift_x", 0.0), limits.get("shift_y", 0.0)
    # A rotation can turn the shift, up to a diagonal one, towards any side.
    reach = math.hypot(*shifts) if "angle_deg" in limits else max(shifts)
    # Within this radius, bilinear sampling of I takes all four neighbours from inside the image.
    radius = (image_size - 1) / 2 - reach * image_size
    if radius < 1:
        raise ValueError(
            f"{task}: shifts up to {max(shifts):g} of the side leave nothing to see; choose a smaller range"
        )
    borders = {"masked": Appearance(image_size, radius)}
    if canvas_side == image_size:
        borders = {"none": Appearance(image_size, None), **borders}
    else:
        borders = {"zeros": Appearance(image_size, None), **borders, "canvas": Appearance(canvas_side, None)}
    return [Setting(task, border, transform, appearance) for border, appearance in borders.items()]


def draw_theta(task: str, transform: Transform, num_images: int, draws: int, split: str) -> Tensor:
    """Draws parameters [draws, N, P], the same for the same arguments; all borders of a task share them."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{task}.{split}".encode()))
    return torch.stack([transform.sample(num_images, generator) for _ in range(draws)])


class SizedImages(EvaluationSamples):
    """Dataset that decodes each image once and resizes it to several sides: {side: [3, side, side] uint8}.

    `image_size` is preprocessed as in every evaluation; other sides keep the whole short side.
    """

    def __init__(self, dataset: ImageDataset, image_size: int, sides: Sequence[int]) -> None:
        super().__init__(dataset, image_size)
        self.resize = {side: resize_and_crop(side, side) for side in sides}
        self.resize[image_size] = self.preprocess

    def __getitem__(self, index: int) -> dict[int, Tensor]:
        image = read_to_evaluate(self.dataset, index)
        return {side: resize(image) for side, resize in self.resize.items()}


class PairFeatures:
    """Features from `extract_pairs`; those of an I that several settings share are held once.

    In the methods `tokens` is one of those that `extract_pairs` was given, and F the width of its features.

    Args:
        features: by encoder and what it sees, [draws, N, P], [1, N, P] for an I: the parts, concatenated.
        parts: keys of `probes.features.WIDTHS`, in order.
        equivariant: map of tokens to their equivariant part, by encoder; empty where no such tokens are asked for.
    """

    def __init__(
        self,
        features: Mapping[tuple[str, Appearance | Setting], Tensor],
        parts: Sequence[str],
        equivariant: Mapping[str, Callable[[Tensor], Tensor]],
    ) -> None:
        self._features = features
        self._parts = parts
        self._equivariant = equivariant

    def of_images(self, encoder: str, appearance: Appearance, tokens: str) -> Tensor:
        """Returns features [N, F] of I, float32 on the CPU."""
        return self._select(encoder, appearance, tokens)[0]

    def of_transformed(self, encoder: str, setting: Setting, tokens: str) -> Tensor:
        """Returns features [draws * N, F] of g(I); the first N are of draw one."""
        return self._select(encoder, setting, tokens).flatten(0, 1)

    def pairs(self, encoder: str, setting: Setting, tokens: str) -> Tensor:
        """Returns features [draws * N, 2F] of I and g(I), concatenated; the first N are of draw one."""
        transformed = self.of_transformed(encoder, setting, tokens)
        images = self.of_images(encoder, setting.appearance, tokens)
        return torch.cat([images.repeat(len(transformed) // len(images), 1), transformed], dim=1)

    def _select(self, encoder: str, key: Appearance | Setting, tokens: str) -> Tensor:
        features, widths = self._features[encoder, key], [WIDTHS[part] for part in self._parts]
        dim = features.shape[-1] // sum(widths)
        found = dict(zip(self._parts, features.split([width * dim for width in widths], dim=-1), strict=True))
        if tokens in MODES:
            return torch.cat([found[part] for part in MODES[tokens]], dim=-1)
        cells = found[EQUIVARIANT_MODES[tokens]].unflatten(-1, (-1, dim))
        return self._equivariant[encoder](cells).flatten(-2)


def extract_pairs(
    encoders: dict[str, Encoder],
    settings: Sequence[Setting],
    theta: dict[str, Tensor],
    dataset: ImageDataset,
    indices: Sequence[int],
    *,
    tokens: Sequence[str] = ("both",),
    appearances: Sequence[Appearance] = (),
    device: torch.device,
    batch_size: int,
    num_workers: int,
    half_precision: bool = False,
) -> PairFeatures:
    """Computes features of I and g(I) for every encoder and setting.

    Each image is decoded once; the features of an I that several settings share are computed once. The encoders, in
    eval mode on `device`, must agree on image size.

    Args:
        encoders: by name.
        theta: [draws, N, P] by task.
        tokens: what to pool, keys of `probes.features.MODES` or `EQUIVARIANT_MODES`; the latter need encoders whose
            tokens are split.
        appearances: extra appearances of I to compute features for.
        half_precision: see `pooled_features`.

    Raises:
        ValueError: there are no images, or a feature is NaN or infinite.
    """
    num_images = len(indices)
    if not num_images:
        raise ValueError(f"{dataset.data_string!r} has no images to compute features of.")
    own = even_share(num_images)
    size = next(iter(encoders.values())).image_size
    shown = list(dict.fromkeys([*(setting.appearance for setting in settings), *appearances]))
    loader = Loader(
        Subset(SizedImages(dataset, size, [look.side for look in shown]), [int(indices[place]) for place in own]),
        batch_size=batch_size,
        num_workers=num_workers,
    )
    parts = list(dict.fromkeys(part for kind in tokens for part in MODES.get(kind) or [EQUIVARIANT_MODES[kind]]))
    equivariant = {}
    if any(kind in EQUIVARIANT_MODES for kind in tokens):
        equivariant = {name: _equivariant_part(name, encoder) for name, encoder in encoders.items()}
    features: dict[tuple[str, Appearance | Setting], list[Tensor]] = {}

    def encode(key: Appearance | Setting, images: Tensor) -> None:
        for name, encoder in encoders.items():
            look = {"mean": encoder.mean, "std": encoder.std, "half_precision": half_precision}
            rows = [
                torch.cat(pooled_parts(encoder.backbone, draw, parts, **look), dim=1).cpu()
                for draw in images  # [draws, B, 3, S, S]
            ]
            features.setdefault((name, key), []).append(torch.stack(rows, dim=1))  # [B, draws, P]

    places = torch.from_numpy(own).split(batch_size)
    batches = progress_bar(loader, unit="batch")
    for place, uint8_images in zip(places, batches, strict=True):
        images = {side: batch.to(device).float() / 255 for side, batch in uint8_images.items()}
        for appearance in shown:
            encode(appearance, _show(_centre(images[appearance.side], size), appearance)[None])
        for setting in settings:
            canvas = images[setting.appearance.side]
            moved = [
                setting.transform.apply(canvas, draw[place].to(device), (size, size)) for draw in theta[setting.task]
            ]
            encode(setting, _show(torch.stack(moved), setting.appearance))
    whole = {key: gather_rows(torch.cat(rows))[:num_images].transpose(0, 1) for key, rows in features.items()}
    for found in whole.values():
        require_finite(found.flatten(0, 1))
    return PairFeatures(whole, parts, equivariant)


def _equivariant_part(name: str, encoder: Encoder) -> Callable[[Tensor], Tensor]:
    if encoder.equivariant is None:
        raise ValueError(
            f"{name} has no equivariant half: its tokens were never split, as in a run with equivariance.enabled=false "
            f"or in weights from elsewhere. Leave out --tokens {' and '.join(EQUIVARIANT_MODES)}"
        )
    return encoder.equivariant


def _centre(images: Tensor, size: int) -> Tensor:
    """Crops square images to their centre [..., size, size]."""
    margin = (images.shape[-1] - size) // 2
    return images[..., margin : margin + size, margin : margin + size]


def _show(images: Tensor, appearance: Appearance) -> Tensor:
    """Blackens everything outside the disc of the mask."""
    if appearance.mask_radius is None:
        return images
    offset = torch.arange(images.shape[-1], device=images.device) - (images.shape[-1] - 1) / 2
    return images * (torch.hypot(offset[:, None], offset[None, :]) <= appearance.mask_radius)
