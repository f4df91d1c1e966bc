"""Optimizer groups by DINOv2's rules: layer-wise learning-rate decay; no weight decay of biases, norms, LayerScale."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn

from dinov2_eq.train.schedules import ScheduledValues


def build_param_groups(
    modules: Mapping[str, nn.Module], *, layerwise_decay: float, patch_embed_lr_mult: float
) -> list[dict[str, Any]]:
    """Groups all trainable parameters by (lr_multiplier, wd_multiplier, part).

    Args:
        modules: the trainable modules by name; only the one called "backbone" has layer-wise decay.
    """
    groups: dict[tuple[float, float, str], list[nn.Parameter]] = defaultdict(list)
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr_multiplier = 1.0
            if module_name == "backbone":
                lr_multiplier = layerwise_decay ** (module.num_layers + 1 - module.layer_of(name))
                if module.is_patch_embed(name):
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
