"""Wraps backbones of other libraries in the part of the interface of `DinoVisionTransformer` that evaluations use.

This is `backbone(images, is_training=True)` with x_norm_clstoken [B, D] and x_norm_patchtokens [B, N, D],
`get_intermediate_layers`, `embed_dim` and `patch_size`.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dinov2_eq.models import DinoVisionTransformer

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
IMAGENET_SIZE = 224
UNUSED = ("mask_token", "pooler")  # parts of a Hugging Face model that may be missing, because features do not use them

logger = logging.getLogger(__name__)


class Foreign(NamedTuple):
    """A backbone, and the preprocessing of its images."""

    backbone: nn.Module
    untrained: Callable[[], nn.Module]  # builds the same architecture with fresh weights
    image_size: int  # pixels
    mean: list[float]
    std: list[float]


class TimmBackbone(nn.Module):
    """A timm model that outputs tokens; if it has no class token, the mean of the patch tokens replaces it.

    Raises:
        ValueError: the model has no patch tokens, for example a convolutional network.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        if patch_size is None or not hasattr(model, "forward_intermediates"):
            raise ValueError(f"{type(model).__name__} has no patch tokens; only vision transformers can be evaluated")
        self.model = model
        self.embed_dim = model.num_features
        self.patch_size = patch_size[0] if isinstance(patch_size, Sequence) else patch_size
        self.num_prefix_tokens = getattr(model, "num_prefix_tokens", 0)
        self.has_class_token = getattr(model, "cls_token", None) is not None

    def forward(self, images: Tensor, is_training: bool = False) -> Tensor | dict[str, Tensor]:
        tokens = self.model.forward_features(images)  # [B, prefix + N, D]
        if tokens.ndim != 3:
            raise ValueError(
                f"{type(self.model).__name__} gives maps of shape {tuple(tokens.shape)} and no tokens; only vision "
                "transformers can be evaluated"
            )
        patches, prefix = tokens[:, self.num_prefix_tokens :], tokens[:, : self.num_prefix_tokens]
        features = {"x_norm_clstoken": self._class_token(patches, prefix), "x_norm_patchtokens": patches}
        return features if is_training else features["x_norm_clstoken"]

    def _class_token(self, patches: Tensor, prefix: Tensor | None) -> Tensor:
        return prefix[:, 0] if self.has_class_token else patches.mean(dim=1)

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, return_class_token: bool = False
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        layers = self.model.forward_intermediates(
            x, n, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
        )
        pairs = [layer if isinstance(layer, tuple) else (layer, None) for layer in layers]
        if not return_class_token:
            return tuple(patches for patches, _ in pairs)
        return tuple((patches, self._class_token(patches, prefix)) for patches, prefix in pairs)


class HuggingFaceBackbone(nn.Module):
    """A vision transformer of Hugging Face's transformers, with a class token at the start and a final norm.

    Raises:
        ValueError: the model is of another kind.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config = model.config
        norms = [getattr(model, name) for name in ("layernorm", "norm") if hasattr(model, name)]
        if not norms or not hasattr(config, "hidden_size") or not isinstance(getattr(config, "patch_size", None), int):
            raise ValueError(
                f"{type(model).__name__} is no vision transformer that can be evaluated; Dinov2Model, "
                "Dinov2WithRegistersModel and ViTModel are"
            )
        self.model = model
        self.norm = norms[0]
        self.embed_dim = config.hidden_size
        self.patch_size = config.patch_size

    def forward(self, images: Tensor, is_training: bool = False) -> Tensor | dict[str, Tensor]:
        patches, cls_token = self._split(self.model(pixel_values=images).last_hidden_state, images)
        features = {"x_norm_clstoken": cls_token, "x_norm_patchtokens": patches}
        return features if is_training else cls_token

    def _split(self, tokens: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        num_patches = (images.shape[-2] // self.patch_size) * (images.shape[-1] // self.patch_size)
        if tokens.shape[1] <= num_patches:
            raise ValueError(
                f"{type(self.model).__name__} gives {tokens.shape[1]} tokens for {num_patches} patches: there is no "
                "class token, or only some of the patches are seen"
            )
        return tokens[:, -num_patches:], tokens[:, 0]

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, return_class_token: bool = False
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        layers = self.model(pixel_values=x, output_hidden_states=True).hidden_states[1:]  # the first is the input
        wanted = range(len(layers) - n, len(layers)) if isinstance(n, int) else n
        pairs = [self._split(self.norm(layers[index]), x) for index in wanted]
        return tuple(pairs) if return_class_token else tuple(patches for patches, _ in pairs)


def load_timm(name: str, pretrained: bool) -> Foreign:
    """Loads a timm model by name, which may be `hf-hub:REPO` or `local-dir:FOLDER`.

    Raises:
        ValueError: timm is not installed, does not know the name or cannot get the weights, or the model is not a
            vision transformer.
    """
    try:
        import timm
    except ImportError:
        raise ValueError(f"timm:{name} needs the package timm: pip install timm") from None

    def build(pretrained: bool) -> nn.Module:
        try:
            return TimmBackbone(timm.create_model(name, pretrained=pretrained, num_classes=0))
        except Exception as error:  # timm and the libraries below raise many kinds of errors
            raise ValueError(
                f"timm:{name} cannot be loaded: {_reason(error)}. timm.list_models(pretrained=True) has the names; "
                f"random:timm:{name} needs no weights"
            ) from None

    backbone = build(pretrained)
    settings = backbone.model.pretrained_cfg
    size = settings.get("input_size", (3, IMAGENET_SIZE, IMAGENET_SIZE))[-1]
    mean, std = settings.get("mean", IMAGENET_MEAN), settings.get("std", IMAGENET_STD)
    return Foreign(backbone, lambda: build(False), size, list(mean), list(std))


def load_hugging_face(name: str, pretrained: bool) -> Foreign:
    """Loads the model of a Hugging Face repository or folder.

    Raises:
        ValueError: transformers is not installed or cannot load the model, tensors are missing, or the model is not a
            vision transformer.
    """
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError:
        raise ValueError(f"hf:{name} needs the package transformers: pip install transformers") from None

    def build(pretrained: bool) -> nn.Module:
        try:
            if not pretrained:
                return HuggingFaceBackbone(AutoModel.from_config(AutoConfig.from_pretrained(name)))
            model, info = AutoModel.from_pretrained(name, output_loading_info=True)
            backbone = HuggingFaceBackbone(model)
        except Exception as error:  # as for timm
            raise ValueError(
                f"hf:{name} cannot be loaded: {_reason(error)}. Give a repository of huggingface.co, or a folder with "
                "config.json and model.safetensors"
            ) from None
        misfits = [*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])]
        if bad := sorted(key for key in misfits if not any(part in key for part in UNUSED)):
            total = len(model.state_dict())
            raise ValueError(
                f"hf:{name}: loaded {total - len(bad)} of {total} tensors; missing are {', '.join(bad[:3])}"
            )
        return backbone

    backbone = build(pretrained)
    size, mean, std = _processing(name, backbone.model.config.image_size)
    return Foreign(backbone, lambda: build(False), size, mean, std)


def _processing(name: str, trained_size: int) -> tuple[int, list[float], list[float]]:
    """Image size, mean and std of the repository's image processor; by default the model's size, ImageNet's pixels."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        logger.warning("hf:%s has no preprocessor_config.json: ImageNet's mean and std are taken", name)
        settings = {}
    crop = (settings.get("do_center_crop", True) and settings.get("crop_size")) or settings.get("size") or trained_size
    size = crop if isinstance(crop, int) else crop.get("height") or crop.get("shortest_edge", trained_size)
    return size, settings.get("image_mean", IMAGENET_MEAN), settings.get("image_std", IMAGENET_STD)


def load_hub(address: str, pretrained: bool) -> Foreign:
    """Loads a backbone with DINOv2's interface through torch.hub.

    Args:
        address: REPO:NAME. REPO is a folder with a hubconf.py, or owner/name[:branch] on GitHub. Its code runs here;
            for GitHub, torch.hub asks once whether to trust it.

    Raises:
        ValueError: incomplete address, or the repository or entry point cannot be used or is not yet trusted.
    """
    repo, _, name = address.rpartition(":")
    if not repo:
        raise ValueError(f"hub:{address}: write hub:REPO:NAME, for example hub:facebookresearch/dinov2:dinov2_vits14")
    source = "local" if Path(repo).is_dir() else "github"

    def build(pretrained: bool) -> nn.Module:
        try:
            return torch.hub.load(repo, name, source=source, trust_repo="check", pretrained=pretrained)
        except EOFError:
            raise ValueError(
                f"hub:{address} runs code of {repo}, and there is no terminal to ask whether you trust it. If you do, "
                f"run torch.hub.list({repo!r}, trust_repo=True) once in Python"
            ) from None
        except Exception as error:  # the code of a repository may raise anything
            raise ValueError(f"hub:{address} cannot be loaded: {_reason(error)}") from None

    def untrained() -> nn.Module:
        if not isinstance(backbone, DinoVisionTransformer):
            return build(False)
        fresh = copy.deepcopy(backbone).cpu()  # not `build`, as a release may have fewer blocks than its entry point
        fresh.init_weights()
        return fresh

    backbone = build(pretrained)
    patch_size = getattr(backbone, "patch_size", IMAGENET_SIZE)
    usual = {"image_size": IMAGENET_SIZE // patch_size * patch_size, "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    wanted = getattr(backbone, "preprocessing", None) or usual
    return Foreign(backbone, untrained, wanted["image_size"], list(wanted["mean"]), list(wanted["std"]))


LOADERS: dict[str, Callable[[str, bool], Foreign]] = {"timm": load_timm, "hf": load_hugging_face, "hub": load_hub}


@torch.inference_mode()
def require_tokens(source: str, backbone: nn.Module, image_size: int) -> None:
    """Runs the backbone on one black image, to check that its outputs are those that evaluations need.

    Raises:
        ValueError: the backbone fails, or its outputs have other shapes.
    """
    images = torch.zeros(1, 3, image_size, image_size)
    try:
        features: Any = backbone(images, is_training=True)
        patches, cls_token = backbone.get_intermediate_layers(images, 1, return_class_token=True)[-1]
        dim, num_patches = backbone.embed_dim, (image_size // backbone.patch_size) ** 2
        outputs = [features["x_norm_clstoken"], features["x_norm_patchtokens"], cls_token, patches]
    except (TypeError, KeyError, AttributeError, RuntimeError, AssertionError, ValueError) as error:
        raise ValueError(
            f"{source} cannot be evaluated: it fails on an image of {image_size} pixels: {_reason(error)}"
        ) from None
    expected = [(1, dim), (1, num_patches, dim)] * 2
    if (shapes := [tuple(tensor.shape) for tensor in outputs]) != expected:
        raise ValueError(
            f"{source} cannot be evaluated: for one image of {image_size} pixels its class token and patch tokens have "
            f"shapes {shapes}, expected {expected}"
        )


def _reason(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
