"""ResNet-18 and -50 of torchvision as backbones (He et al., arXiv 1512.03385).

The class token is the globally pooled output, the patch tokens are the last feature map. Batch statistics are those of
all processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dinov2_eq.layers.batch_norm import SyncBatchNorm
from dinov2_eq.models.backbone import Backbone, BackboneKind

STEM = ("conv1.", "bn1.")


class ResNet(Backbone):
    """A ResNet of torchvision without its classifier; parameters have torchvision's names.

    Images may have any size; a map is the image divided by 32, rounded up.

    Args:
        name: "resnet18" or another constructor of `torchvision.models`.
    """

    patch_size = 32
    num_layers = 4

    def __init__(self, name: str) -> None:
        import torchvision  # here, as the entry points of torch.hub need torch alone

        super().__init__()
        model = getattr(torchvision.models, name)(weights=None, norm_layer=SyncBatchNorm)
        self.embed_dim = model.fc.in_features
        del model.fc, model.avgpool
        for name, child in model.named_children():
            self.add_module(name, child)
        self.init_weights()

    def init_weights(self) -> None:
        """Sets every parameter as torchvision does: needed after `to_empty`, and with a new seed it starts afresh."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, SyncBatchNorm):
                module.reset_parameters()

    def stages(self) -> Sequence[nn.Module]:
        return [self.layer1, self.layer2, self.layer3, self.layer4]

    def layer_of(self, name: str) -> int:
        return 0 if name.startswith(STEM) else int(name.removeprefix("layer").split(".")[0])

    def is_patch_embed(self, name: str) -> bool:
        return name.startswith(STEM)

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Any:
        """Encodes images; see `Backbone.forward`.

        Raises:
            ValueError: masks are given.
        """
        if isinstance(x, Tensor):
            return self._encode(x, masks, is_training)
        masks = masks or [None] * len(x)
        return [self._encode(images, given, is_training) for images, given in zip(x, masks, strict=True)]

    def _encode(self, images: Tensor, masks: Tensor | None, is_training: bool) -> Tensor | dict[str, Tensor]:
        if masks is not None:
            raise ValueError("A ResNet has no mask token, so patches cannot be masked; set ibot.loss_weight=0")
        *_, last = self._maps(images)
        cls = last.mean((2, 3))
        return {"x_norm_clstoken": cls, "x_norm_patchtokens": _tokens(last)} if is_training else cls

    def _maps(self, images: Tensor) -> list[Tensor]:
        """The feature map after each stage."""
        maps = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        outputs = []
        for stage in self.stages():
            maps = stage(maps)
            outputs.append(maps)
        return outputs

    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Returns the maps of some of the four stages, of which each has a width and a grid of its own.

        Args:
            x: images [B, C, H, W].
            n: the last n stages, or the numbers of the stages, counted from 0.
            reshape: maps [B, D, h, w] in place of tokens [B, N, D].
            return_class_token: pairs (patches, pooled map [B, D]).

        Raises:
            ValueError: a stage that does not exist.
        """
        wanted = range(4 - n, 4) if isinstance(n, int) else n
        if not set(wanted) <= set(range(4)):
            raise ValueError(f"n={n} asks for a stage that does not exist: a ResNet has 4, numbered 0 to 3")
        maps = self._maps(x)
        chosen = [maps[stage] for stage in sorted(wanted)]
        patches = [each if reshape else _tokens(each) for each in chosen]
        if return_class_token:
            return tuple(zip(patches, (each.mean((2, 3)) for each in chosen), strict=True))
        return tuple(patches)


def _tokens(maps: Tensor) -> Tensor:
    """Turns maps [B, D, h, w] into tokens [B, h w, D], row by row."""
    return maps.flatten(2).transpose(1, 2)


def resnet(name: str) -> BackboneKind:
    """Returns a ResNet of torchvision; the settings of transformers mean nothing for it."""
    return BackboneKind(
        lambda settings, img_size: ResNet(name),
        patch_size=lambda settings: ResNet.patch_size,
        masks_patches=False,
        whole_patches=False,
        weights_of=_weights_of,
    )


def _weights_of(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Finds the backbone of a run, or torchvision's model without its classifier.

    Raises:
        ValueError: there is none.
    """
    tensors = checkpoint.get("teacher", checkpoint)
    own = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    found = own or {name: value for name, value in tensors.items() if not name.startswith("fc.")}
    if "conv1.weight" not in found:
        raise ValueError(
            "No ResNet is named in these weights. Known are the names of torchvision (conv1.weight, "
            "layer1.0.conv1.weight), bare or within a checkpoint of a run"
        )
    return found
