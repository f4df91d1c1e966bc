"""The entry points of `hubconf.py`, one for each architecture and patch size, with and without registers."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_eq.equivariance.split import TokenSplit, projection_of, split_like
from dinov2_eq.hub.manifest import Release, download, find_file, read_manifest, weights_folder
from dinov2_eq.models import ARCHS, DinoVisionTransformer, build_backbone
from dinov2_eq.models.convert import adapt, backbone_arguments, describe_misfit, infer_architecture, to_dinov2
from dinov2_eq.models.weight_files import Checkpoint, read_checkpoint

LETTERS = {"t": "vit_tiny", "s": "vit_small", "b": "vit_base", "l": "vit_large", "g": "vit_giant2"}
PATCH_SIZES = (8, 14, 16)
NUM_REGISTERS = 4
IMG_SIZE = 224

DOCSTRING = """{arch}, patches of {patch_size} pixels{registers}: {depth} blocks, tokens of {embed_dim} channels.

Keyword arguments:
    pretrained: load released weights; False: random weights.
    weights: the name of a release (`weights/manifest.json`), or the path or URL of a .safetensors or torch file, with
        the names of this project, DINOv2, DINO, iBOT, timm or Hugging Face. A URL may end in #sha256=DIGEST, which is
        then checked. Files may have another depth than the above. None: the default release of this entry point.
    projection: return a `BackboneWithProjection`, which also computes the invariant and equivariant features.
    others: arguments of `dinov2_eq.models.build_backbone`, for example img_size or drop_path_rate.

Returns:
    a `DinoVisionTransformer`, with DINOv2's interface, in eval mode. Its attribute `preprocessing` describes the images
    of the training (image_size in pixels, mean and std of pixels in [0, 1]); None if this is unknown.

Raises:
    FileNotFoundError: the file does not exist.
    ValueError: unknown release, or weights that are damaged or of another architecture.
"""

logger = logging.getLogger(__name__)


class Features(NamedTuple):
    """Output of a `BackboneWithProjection`."""

    cls: Tensor  # [B, D] class token after the final norm
    patches: Tensor  # [B, N, D] patch tokens after the final norm
    invariant: Tensor  # [B, 1 + N, D_inv] of class token and patches, seen by the base losses; may be the whole tokens
    equivariant: Tensor  # [B, 1 + N, D_equi] of class token and patches; the decoders trained those of the patches


class BackboneWithProjection(nn.Module):
    """A backbone with the projection that splits its tokens (arXiv 2503.18753, section 3)."""

    def __init__(self, backbone: DinoVisionTransformer, projection: TokenSplit) -> None:
        super().__init__()
        self.backbone = backbone
        self.projection = projection
        self.embed_dim = backbone.embed_dim
        self.patch_size = backbone.patch_size

    def forward(self, images: Tensor) -> Features:
        """Computes features of normalised images [B, 3, H, W], whose sides are multiples of the patch size."""
        features = self.backbone.forward_features(images)
        cls, patches = features["x_norm_clstoken"], features["x_norm_patchtokens"]
        tokens = torch.cat([cls.unsqueeze(1), patches], dim=1)  # [B, 1 + N, D]
        return Features(cls, patches, self.projection.invariant(tokens), self.projection.equivariant(tokens))


def entry_point_of(arch: str, patch_size: int, num_register_tokens: int) -> str:
    """Name of the entry point for an architecture.

    Raises:
        ValueError: there is no entry point for it.
    """
    letter = next((letter for letter, name in LETTERS.items() if name == arch), None)
    if letter is None or patch_size not in PATCH_SIZES:
        raise ValueError(
            f"No entry point for {arch} with patches of {patch_size} pixels; there are {', '.join(LETTERS.values())} "
            f"with {', '.join(map(str, PATCH_SIZES))}"
        )
    return f"dinov2_eq_vit{letter}{patch_size}" + ("_reg" if num_register_tokens else "")


def _make_entry_point(arch: str, patch_size: int, with_registers: bool) -> Callable[..., nn.Module]:
    def entry_point(
        *, pretrained: bool = True, weights: str | Path | None = None, projection: bool = False, **others: Any
    ) -> nn.Module:
        if not pretrained and (weights is not None or projection):
            raise ValueError("pretrained=False gives random weights: omit weights and projection, or pretrained=False")
        if pretrained:
            return _load(name, weights, projection, others)
        registers = {"num_register_tokens": NUM_REGISTERS, "interpolate_antialias": True, "interpolate_offset": 0.0}
        arguments = {"img_size": IMG_SIZE, **(registers if with_registers else {}), **others}
        return _finish(build_backbone(arch, patch_size=patch_size, **arguments), None)

    name = entry_point_of(arch, patch_size, NUM_REGISTERS * with_registers)
    entry_point.__name__ = entry_point.__qualname__ = name
    registers = f", {NUM_REGISTERS} register tokens" if with_registers else ""
    shape = {"depth": ARCHS[arch].depth, "embed_dim": ARCHS[arch].embed_dim}
    entry_point.__doc__ = DOCSTRING.format(arch=arch, patch_size=patch_size, registers=registers, **shape)
    return entry_point


def _load(name: str, weights: str | Path | None, with_projection: bool, others: Mapping[str, Any]) -> nn.Module:
    path, checkpoint = _read(name, weights)
    config = checkpoint.config
    state = to_dinov2(checkpoint.content)
    architecture, preprocessing = _inferred(state) if config is None else _of_config(config)
    right_name = entry_point_of(*(architecture[key] for key in ("arch", "patch_size", "num_register_tokens")))
    if right_name != name:
        raise ValueError(f"The weights of {path} are for {right_name}, not for {name}; call {right_name}")
    backbone = build_backbone(**{**architecture, **others})
    if config is None or others:
        state, notes = adapt(state, backbone)
        for note in notes:
            logger.info("%s: %s", path, note)
    _fill(backbone, state, "backbone", path)
    return _finish(_with_projection(backbone, checkpoint, path) if with_projection else backbone, preprocessing)


def _read(name: str, weights: str | Path | None) -> tuple[Path, Checkpoint]:
    """Finds and reads the file that `weights` refers to."""
    folder = weights_folder()
    releases = read_manifest(folder)
    if weights is None:
        weights = next(
            (known for known, release in releases.items() if release.default and release.entry_point == name), None
        )
        if weights is None:
            raise ValueError(
                f"No weights are released for {name}; {_listed(releases)}. Use pretrained=False for random weights, or "
                "weights=PATH or URL for your own"
            )
    text = str(weights)
    if text in releases:
        path, sha256 = find_file(text, releases[text], folder), releases[text].sha256
    elif "://" in text:
        url, _, sha256 = text.partition("#sha256=")
        path, sha256 = download(url, sha256 or None), sha256 or None
    elif Path(text).is_file():
        path, sha256 = Path(text), None
    else:
        raise FileNotFoundError(f"weights={text!r} is neither a release, a file nor a URL; {_listed(releases)}")
    return path, read_checkpoint(path, sha256)


def _listed(releases: Mapping[str, Release]) -> str:
    """Lists the releases for a message."""
    listed = ", ".join(f"{name} ({release.entry_point})" for name, release in releases.items())
    return f"released weights: {listed or 'none yet'}"


def _of_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of `build_backbone` and the preprocessing, from a training config."""
    crops = config["crops"]
    architecture = {**backbone_arguments(config["student"]), "img_size": crops["global_crops_size"]}
    return architecture, {"image_size": crops["global_crops_size"], "mean": crops["mean"], "std": crops["std"]}


def _inferred(state: Mapping[str, Tensor]) -> tuple[dict[str, Any], None]:
    """Arguments of `build_backbone` inferred from weights alone, which do not contain the preprocessing."""
    inferred = infer_architecture(state)
    arch = next((name for name, known in ARCHS.items() if known.embed_dim == inferred["embed_dim"]), None)
    if arch is None:
        raise ValueError(f"Tokens of {inferred['embed_dim']} channels are of no architecture here: {', '.join(ARCHS)}")
    settings = backbone_arguments({**inferred, "arch": arch, "layerscale": inferred["init_values"] or 0.0})
    return settings | {"img_size": inferred["img_size"]}, None


def _with_projection(backbone: DinoVisionTransformer, checkpoint: Checkpoint, path: Path) -> BackboneWithProjection:
    state = projection_of(checkpoint.content)
    if not state:
        raise ValueError(
            f"{path} has no projection: its tokens were never split into invariant and equivariant parts. Omit "
            f"projection=True, or use weights that have one; {_listed(_with_a_projection())}"
        )
    projection = split_like(state, backbone.embed_dim)
    _fill(projection, state, "projection", path)
    return BackboneWithProjection(backbone, projection)


def _with_a_projection() -> dict[str, Release]:
    releases = read_manifest(weights_folder())
    return {name: release for name, release in releases.items() if "projection" in release.contains}


def _fill(module: nn.Module, state: Mapping[str, Tensor], what: str, path: Path) -> None:
    if misfit := describe_misfit(module.state_dict(), state):
        raise ValueError(f"The {what} of {path} does not fit the architecture: {misfit}")
    module.load_state_dict(state)
    logger.info("loaded %d of %d tensors of the %s from %s", len(state), len(state), what, path)


def _finish(module: nn.Module, preprocessing: dict[str, Any] | None) -> nn.Module:
    module.preprocessing = preprocessing
    return module.eval()


ENTRY_POINTS = {
    entry_point.__name__: entry_point
    for arch in LETTERS.values()
    for patch_size in PATCH_SIZES
    for entry_point in (_make_entry_point(arch, patch_size, False), _make_entry_point(arch, patch_size, True))
}
