"""What training, sharding and evaluation ask of a backbone; nothing else knows its class or its parameters' names."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from dinov2_eq.settings import StudentConfig

FLOAT_BYTES = 4


class BackboneKind(NamedTuple):
    """An entry of `BACKBONES`: how to build a backbone, and what a config must agree with before it is built."""

    build: Callable[[StudentConfig, int], "Backbone"]  # of the settings and the side of the images in pixels
    patch_size: Callable[[StudentConfig], int]  # pixels of an image side that one patch token stands for
    masks_patches: bool  # whether patches can be hidden from it
    whole_patches: bool  # whether images must be made of whole patches
    weights_of: Callable[[Mapping[str, Any]], dict[str, Tensor]]  # finds the backbone's tensors in a checkpoint


class Kept(NamedTuple):
    """Memory of one stage for one image, in bytes."""

    inside: float  # what autograd keeps of the stage
    input: float  # its input, which is all that activation checkpointing keeps


class Backbone(nn.Module, ABC):
    """A network from images to one class token and a grid of patch tokens for each image.

    Attributes:
        embed_dim: channels D of the tokens.
        patch_size: pixels of an image side that one patch token stands for.
        num_layers: depth L for layer-wise learning rates, see `layer_of`.
    """

    embed_dim: int
    patch_size: int
    num_layers: int

    @abstractmethod
    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        masks: Tensor | Sequence[Tensor | None] | None = None,
        is_training: bool = False,
    ) -> Any:
        """Encodes images [B, C, H, W], or a list of them with one entry for each size.

        Returns:
            The class tokens [B, D]. With `is_training` a dict with x_norm_clstoken [B, D] and x_norm_patchtokens
            [B, N, D]. For a list of images a list of these.
        """

    @abstractmethod
    def get_intermediate_layers(
        self, x: Tensor, n: int | Sequence[int] = 1, reshape: bool = False, return_class_token: bool = False
    ) -> tuple[Tensor | tuple[Tensor, Tensor], ...]:
        """Returns the patch tokens [B, N, D] of some stages, with `return_class_token` in pairs with class tokens."""

    @abstractmethod
    def stages(self) -> Sequence[nn.Module]:
        """Returns the parts to shard, to compile and to compute again in the backward pass, in order."""

    @abstractmethod
    def layer_of(self, name: str) -> int:
        """Returns the layer that a parameter belongs to, from 0 (the input) to `num_layers` + 1 (the output)."""

    def is_patch_embed(self, name: str) -> bool:
        """Returns whether `optim.patch_embed_lr_mult` holds for a parameter."""
        return False

    def start_from(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Fits foreign weights to this backbone; returns a state dict, and notes on what was changed.

        Raises:
            ValueError: they do not fit.
        """
        from dinov2_eq.models.convert import describe_misfit

        if misfit := describe_misfit(self.state_dict(), weights):
            raise ValueError(misfit)
        return dict(weights), []

    def kept_of_image(self, size: int, compute_bytes: int) -> list[Kept]:
        """Returns what training keeps of one image of `size` x `size` pixels, for each stage.

        Measured on a forward of this backbone, which must be on the meta device.
        """
        stages, inside, inputs = list(self.stages()), [], []
        own = [tensor.untyped_storage() for tensor in (*self.parameters(), *self.buffers())]
        kept = {id(storage): 0 for storage in own}  # bytes by storage; several operations may keep the same
        alive: list[Any] = [*own]  # so that no id comes twice

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept.setdefault(id(storage), storage.nbytes())
            alive.append(storage)
            return tensor

        hooks = [stage.register_forward_pre_hook(lambda _, args: inputs.append(args[0].nbytes)) for stage in stages]
        hooks += [stage.register_forward_hook(lambda *_: inside.append(sum(kept.values()))) for stage in stages]
        with saved_tensors_hooks(note, lambda tensor: tensor):
            self(torch.empty(2, 3, size, size, device="meta", requires_grad=True))
        for hook in hooks:
            hook.remove()
        scale = compute_bytes / FLOAT_BYTES / 2  # two images, as BatchNorm wants more than one
        before = [0, *inside[:-1]]
        return [
            Kept((after - earlier) * scale, given / 2)
            for after, earlier, given in zip(inside, before, inputs, strict=True)
        ]
