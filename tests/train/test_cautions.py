"""Warnings about settings that run and train nothing; no recipe gets one."""

from pathlib import Path

import pytest
import torch

from dinov2_eq.config.load import load_config
from dinov2_eq.train.cautions import cautions
from dinov2_eq.train.train import do_train
from tests.helpers import tiny_config

FOLDER = Path(__file__).parents[2] / "configs" / "train"
G_OF_ITS_OWN = ["equivariance.enabled=false"]
RECIPES = sorted(str(path.relative_to(FOLDER).with_suffix("")) for path in FOLDER.rglob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_need_none(recipe):
    assert cautions(load_config(recipe)) == []


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["ibot.mask_ratio_min_max=[0,0]"],
            "iBOT learns almost nothing: no patch was masked in 256 trial masks with ibot.mask_ratio_min",
        ),
        (["crops.global_crops_size=8"], "of the 1 x 1 patches of a global crop"),
        (["dino.head_n_prototypes=1"], "dino.head_n_prototypes=1: with one prototype the loss is always 0"),
        (["ibot.separate_head=true", "ibot.head_n_prototypes=1"], "ibot.head_n_prototypes=1: with one prototype"),
        (
            ["equivariance.transform=rotation", "equivariance.max_angle_deg=0"],
            "equivariance.transform=rotation changes nothing (angle_deg 0), so there is nothing to keep",
        ),
        (["equivariance.max_angle_deg=0", "equivariance.max_shift=0"], "equivariance.transform=se2 changes nothing"),
        (
            ["equivariance.transform=blur", "equivariance.blur_sigma_min_max=[1,1]"],
            "equivariance.transform=blur does the same to every image (blur_sigma 1)",
        ),
        (["train.batch_size_per_gpu=1"], "dino.koleo_loss_weight=0.1 has no effect with train.batch_size_per_gpu=1"),
        (
            ["sie.loss_weight=1", "sie.transform=rotation", "sie.max_angle_deg=0", "equivariance.enabled=false"],
            "sie.transform=rotation changes nothing (angle_deg 0), so there is nothing to keep",
        ),
        (["teacher.momentum_teacher=1"], "the teacher never moves"),
        *(
            (
                [f"{name}.loss_weight=1", "train.batch_size_per_gpu=1", "dino.koleo_loss_weight=0", *others],
                f"{name}: with train.b",
            )
            for name, others in (("simclr", []), ("vicreg", []), ("sie", G_OF_ITS_OWN), ("equimod", G_OF_ITS_OWN))
        ),
        (["optim.freeze_backbone_steps=6"], "optim.freeze_backbone_steps=6 of optim.steps=6: the backbone is never"),
        (["optim.freeze_last_layer_steps=6"], "the last layer of the heads is never trained"),
    ],
)
def test_each_is_told(overrides, expected):
    (told,) = cautions(tiny_config("optim.freeze_last_layer_steps=1", *overrides))
    assert expected in told


@pytest.mark.parametrize(
    "overrides",
    [
        ["ibot.loss_weight=0", "ibot.mask_ratio_min_max=[0,0]"],
        ["equivariance.enabled=false", "equivariance.max_angle_deg=0", "equivariance.max_shift=0"],
        ["equivariance.max_angle_deg=0"],
        ["ibot.head_n_prototypes=1"],
        ["dino.loss_weight=0", "ibot.separate_head=true", "dino.head_n_prototypes=1"],
        ["dino.koleo_loss_weight=0", "train.batch_size_per_gpu=1"],
    ],
)
def test_what_has_no_effect_anyway_is_not(overrides):
    assert cautions(tiny_config("optim.freeze_last_layer_steps=1", *overrides)) == []


def test_what_they_say_is_true(tmp_path):
    """One prototype, and no masks: the losses are 0, and the run goes on."""
    config = tiny_config("dino.head_n_prototypes=1", "ibot.mask_ratio_min_max=[0,0]", "optim.steps=2")
    do_train(config, tmp_path)
    log = (tmp_path / "logs" / "log.0.txt").read_text()
    assert log.count(" W ") == 2 and log.count("iBOT learns almost nothing") == 1
    state = torch.load(tmp_path / "eval" / "training_2" / "teacher_checkpoint.pth", weights_only=True)
    assert state["step"] == 2
    assert "dino 0.0000" in log and "ibot 0.0000" in log
