"""The rules: each mistake is named with key, value and fix, and what the rules repeat from elsewhere is true."""

from dataclasses import fields

import pytest

from dinov2_eq.config.checks import check
from dinov2_eq.config.load import load_config
from dinov2_eq.config.schema import default_config, sections_of
from dinov2_eq.equivariance.transforms import TransformRanges
from dinov2_eq.objectives.base import MaskNeed, Needs, union
from dinov2_eq.objectives.reconstruction import EquivarianceConfig


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.warmup_steps=200000", "optim.warmup_steps=200000 is more than optim.steps=125000"),
        (
            "crops.global_crops_size=225",
            "crops.global_crops_size=225 is not a multiple of student.patch_size=16; the nearest is 224",
        ),
        ("crops.local_crops_size=8", "crops.local_crops_size=8 is not a multiple"),
        (
            "equivariance.invariant_projection=true equivariance.equivariant_dim=2048",
            "equivariance.equivariant_dim=2048 must be less than equivariance.patch_dim=2048",
        ),
        ("equivariance.num_intermediates=0", "equivariance.num_intermediates=0 must be at least 1"),
        ("equivariance.third_view_size=small", "equivariance.third_view_size='small' is not one of global, local"),
        ("equivariance.border=reflect", "equivariance.border='reflect' is not one of zeros, canvas"),
        (
            "equivariance.decoder=convs",
            "equivariance.decoder='convs' is not one of conv, cross_attention, self_attention",
        ),
        ("student.arch=vit_smal", "student.arch='vit_smal' is not one of vit_tiny, vit_small"),
        ("ibot.mask_ratio_min_max=[0.5,0.1]", r"ibot.mask_ratio_min_max=\[0.5, 0.1\] must be .* low <= high"),
        ("crops.jitter=[0.4,0.4,0.2]", r"must have 4 numbers: \[brightness, contrast, saturation, hue\]"),
        ("crops.jitter=[0.4,0.4,0.2,0.6]", r"crops.jitter=.* hue in turns, must lie in \[0, 0.5\]"),
        ("crops.std=[0.2,0.0,0.2]", r"crops.std=\[0.2, 0.0, 0.2\]: each number must lie in \(0, inf\)"),
        ("crops.global_crops_scale=[0.0,1.0]", r"crops.global_crops_scale=.* must lie in \(0, 1\]"),
        ("evaluation.knn_period_steps=10", "evaluation.knn_train_dataset is empty"),
        ("train.batch_size_per_gpu=0", r"train.batch_size_per_gpu=0 must lie in \[1, inf\)"),
        ("teacher.teacher_temp=0", r"teacher.teacher_temp=0.0 must lie in \(0, inf\)"),
        ("student.drop_path_rate=1", r"student.drop_path_rate=1.0 must lie in \[0, 1\)"),
        ("optim.base_lr=.inf", r"optim.base_lr=inf must lie in \(0, inf\)"),
        ("equivariance.max_angle_deg=181", r"equivariance.max_angle_deg=181.0 must lie in \[0, 180\]"),
        ("ibot.mask_sample_probability=0.001", "masks none of the 128 global crops of a step.* raise it above 1/128"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, override.split())


def test_all_mistakes_at_once():
    with pytest.raises(ValueError) as caught:
        load_config(None, ["optim.warmup_steps=200000", "crops.global_crops_size=225"])
    assert "warmup_steps" in str(caught.value) and "global_crops_size" in str(caught.value)


@pytest.mark.parametrize("decoder", ["cross_attention", "self_attention"])
def test_decoders_with_attention_have_heads(decoder):
    with pytest.raises(ValueError, match=rf"decoder_dim=100 must be a multiple of 64.*decoder={decoder}"):
        load_config(None, [f"equivariance.decoder={decoder}", "equivariance.decoder_dim=100"])


def test_a_disabled_task_is_not_checked():
    load_config(None, ["equivariance.enabled=false", "equivariance.equivariant_dim=9999", "equivariance.border=none"])


def test_without_ibot_nothing_need_be_masked():
    load_config(None, ["ibot.loss_weight=0", "ibot.mask_sample_probability=0"])


NAMES = ("components",)  # fields that are lists, but not of numbers


def fields_of(config):
    for section, settings in sections_of(config).items():
        for each in fields(settings):
            yield section, each, getattr(settings, each.name)


def test_every_field_says_what_it_means_and_every_number_which_values_it_takes():
    for section, each, value in fields_of(default_config()):
        assert each.metadata["meaning"], f"{section}.{each.name}"
        if type(value) in (int, float, list) and each.name not in NAMES:
            assert each.metadata["interval"], f"{section}.{each.name}"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_no_number_may_be_nan_or_infinite(wrong):
    for section, each, value in fields_of(default_config()):
        if type(value) not in (float, list) or each.name in NAMES:
            continue
        config = default_config()
        setattr(getattr(config, section), each.name, [wrong, *value[1:]] if isinstance(value, list) else wrong)
        with pytest.raises(ValueError, match=rf"{section}\.{each.name}=.*must lie in"):
            check(config)


def test_a_resnet_has_no_masks_and_takes_any_size():
    plain = ["student.arch=resnet18", "equivariance.enabled=false"]
    with pytest.raises(ValueError, match=r"ibot masks patches, .* student.arch=resnet18 does not support"):
        load_config(None, plain)
    load_config(None, [*plain, "ibot.loss_weight=0", "crops.global_crops_size=33"])
    with pytest.raises(ValueError, match=r"crops.global_crops_size=48 is not made of whole patches of 32 pixels"):
        load_config(None, ["student.arch=resnet18", "ibot.loss_weight=0", "crops.global_crops_size=48"])
    third = ["equivariance.third_view_size=local", "crops.local_crops_size=48"]
    with pytest.raises(ValueError, match=r"crops.local_crops_size=48 is not made of whole patches .* nearest is 64"):
        load_config(None, ["student.arch=resnet18", "ibot.loss_weight=0", *third])


def test_two_objectives_cannot_need_different_masks():
    needs = {name: Needs(masks=MaskNeed((0.1, high), 0.5)) for name, high in (("ibot", 0.2), ("other", 0.3))}
    with pytest.raises(ValueError, match=r"ibot and other need different masks; set the loss_weight"):
        union(needs)
    assert union({"ibot": needs["ibot"], "dino": Needs(), "same": needs["ibot"]}) == needs["ibot"]


def test_default_ranges_are_those_of_the_transforms():
    task, ranges = EquivarianceConfig(), TransformRanges()
    for field in fields(TransformRanges):
        assert getattr(task, field.name) == pytest.approx(getattr(ranges, field.name))
