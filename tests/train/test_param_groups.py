"""Layer-wise decay and weight-decay rules, against DINOv2's published multipliers."""

import pytest
import torch
from torch import nn

from dinov2_eq.layers.dino_head import DINOHead
from dinov2_eq.models import build_backbone
from dinov2_eq.train.param_groups import apply_schedule, build_param_groups
from dinov2_eq.train.schedules import ScheduledValues


@pytest.fixture(scope="module")
def modules():
    with torch.device("meta"):
        backbone = build_backbone("vit_large", patch_size=16, img_size=224, num_register_tokens=1)
        return {"backbone": backbone, "dino_head": DINOHead(1024, 64), "decoder": nn.Conv2d(3, 3, 1)}


@pytest.fixture(scope="module")
def groups(modules):
    groups = build_param_groups(modules, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    names = {id(p): f"{m}.{n}" for m, module in modules.items() for n, p in module.named_parameters()}
    return {names[id(parameter)]: group for group in groups for parameter in group["params"]}


@pytest.mark.parametrize(
    ("name", "lr"),
    [
        ("backbone.pos_embed", 0.9**25),
        ("backbone.register_tokens", 0.9**25),
        ("backbone.patch_embed.proj.weight", 0.9**25 * 0.2),
        ("backbone.blocks.0.attn.qkv.weight", 0.9**24),
        ("backbone.blocks.23.mlp.fc1.weight", 0.9),
        ("backbone.norm.weight", 1.0),
        ("dino_head.mlp.0.weight", 1.0),
        ("decoder.weight", 1.0),
    ],
)
def test_lr_multiplier(groups, name, lr):
    assert groups[name]["lr_multiplier"] == pytest.approx(lr)


def test_weight_decay_spares_biases_norms_and_gammas(groups):
    spared = {name for name, group in groups.items() if group["wd_multiplier"] == 0}
    assert {"backbone.norm.weight", "backbone.blocks.3.ls1.gamma", "decoder.bias"} <= spared
    decayed = {"backbone.pos_embed", "backbone.cls_token", "backbone.mask_token", "dino_head.last_layer.weight_g"}
    assert not decayed & spared


def test_every_parameter_is_in_one_group(groups, modules):
    assert len(groups) == sum(len(list(module.parameters())) for module in modules.values())


def test_each_part_has_its_own_learning_rate():
    parameter = nn.Parameter(torch.zeros(1))
    groups = [
        {"params": [parameter], "lr_multiplier": 0.5, "wd_multiplier": 1.0, "part": "backbone"},
        {"params": [parameter], "lr_multiplier": 1.0, "wd_multiplier": 0.0, "part": "last_layer"},
        {"params": [parameter], "lr_multiplier": 1.0, "wd_multiplier": 1.0, "part": "other"},
    ]
    values = ScheduledValues(
        lr=0.1,
        last_layer_lr=0.0,
        backbone_lr=0.2,
        weight_decay=0.3,
        teacher_momentum=0.99,
        teacher_temp=0.04,
        progress=0.5,
    )
    apply_schedule(groups, values)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.1, 0.3), (0.0, 0.0), (0.1, 0.3)]
