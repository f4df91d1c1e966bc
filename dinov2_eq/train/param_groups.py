"""Optimizer groups: layer-wise learning-rate decay and who is spared weight decay (DINOv2's rules)."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from dinov2_eq.train.schedules import ScheduledValues

INPUT_NAMES = ("patch_embed.", "pos_embed", "cls_token", "mask_token", "register_tokens")


def layer_index(name: str, depth: int) -> int:
    """0 for the tokens and the patch embedding, i + 1 for block i, depth + 1 for everything after the blocks."""
    if name.startswith(INPUT_NAMES):
        return 0
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return depth + 1


def build_param_groups(
    modules: Mapping[str, nn.Module], *, depth: int, layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict[str, Any]]:
    """Groups all trainable parameters by (lr_multiplier, wd_multiplier, part).

    Args:
        modules: the trainable modules by name; only the one called "backbone" has layer-wise decay.
        depth: number of blocks of the backbone.
    """
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = defaultdict(list)
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            lr_multiplier = 1.0
            if module_name == "backbone":
                lr_multiplier = layerwise_decay ** (depth + 1 - layer_index(name, depth))
                if name.startswith("patch_embed."):
                    lr_multiplier *= patch_embed_lr_mult
            spared = name.endswith("bias") or "norm" in name or "gamma" in name
            part = "backbone" if module_name == "backbone" else "last_layer" if "last_layer" in name else "other"
            groups[lr_multiplier, 0.0 if spared else 1.0, part].append(parameter)
    return [
        {"params": parameters, "lr_multiplier": lr, "wd_multiplier": wd, "part": part}
        for (lr, wd, part), parameters in groups.items()
    ]


def apply_schedule(param_groups: list[dict[str, Any]], values: ScheduledValues) -> None:
    """Sets learning rate and weight decay of every group for this step."""
    lrs = {"backbone": values.backbone_lr, "last_layer": values.last_layer_lr, "other": values.lr}
    for group in param_groups:
        group["lr"] = lrs[group["part"]] * group["lr_multiplier"]
        group["weight_decay"] = values.weight_decay * group["wd_multiplier"]
