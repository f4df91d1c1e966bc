"""Config: merging, and every mistake named with key, value and fix."""

from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

import dinov2_eq
from dinov2_eq.config.load import find_recipe, load_config, to_dict, to_yaml
from dinov2_eq.config.schema import Config

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").rglob("*.yaml"))


def test_defaults_need_no_file():
    assert load_config(None) == Config()


def test_file_then_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("train: {seed: 3, batch_size_per_gpu: 8}\n")
    config = load_config(str(file), ["train.seed=4", "crops.jitter=[0.1,0.1,0.1,0.0]"])
    assert (config.train.seed, config.train.batch_size_per_gpu) == (4, 8)
    assert config.crops.jitter == [0.1, 0.1, 0.1, 0.0]


def test_base_file(tmp_path):
    (tmp_path / "common.yaml").write_text("train: {seed: 3, batch_size_per_gpu: 8}\n")
    (tmp_path / "run.yaml").write_text("base: common.yaml\ntrain: {seed: 5}\n")
    config = load_config(str(tmp_path / "run.yaml"))
    assert (config.train.seed, config.train.batch_size_per_gpu) == (5, 8)


def test_resolved_config_round_trips(tmp_path):
    config = load_config("debug", ["train.seed=9"])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads(recipe):
    load_config(str(recipe))


def test_recipes_by_name():
    assert find_recipe("debug").name == "debug.yaml"
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file; packaged recipes are .*debug"):
        load_config("nowhere")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "equivariance.num_intermediate=3",
            "unknown key 'equivariance.num_intermediate'. Did you mean 'equivariance.num_intermediates'",
        ),
        ("optim.epochs=3", "unknown key 'optim.epochs'"),
        ("num_prototypes=3", "unknown key 'num_prototypes'"),
        ("train.seed=abc", "train.seed.*'abc'"),
        ("train=3", "train"),
        ("seed", "'seed' has no '='"),
        ("optim.warmup_steps=200000", "optim.warmup_steps=200000 must lie between 0 and optim.steps=125000"),
        (
            "crops.global_crops_size=225",
            "crops.global_crops_size=225 is not a multiple of student.patch_size=16; the nearest is 224",
        ),
        ("crops.local_crops_size=8", "crops.local_crops_size=8 is not a multiple"),
        (
            "equivariance.equivariant_dim=2048",
            "equivariance.equivariant_dim=2048 must be .* less than equivariance.patch_dim=2048",
        ),
        ("equivariance.num_intermediates=0", "equivariance.num_intermediates=0 must be at least 1"),
        ("equivariance.border=reflect", "equivariance.border='reflect' is not one of zeros, canvas"),
        ("ibot.mask_ratio_min_max=[0.5,0.1]", "ibot.mask_ratio_min_max"),
        ("evaluation.knn_period_steps=10", "evaluation.knn_train_dataset is empty"),
        ("train.batch_size_per_gpu=0", "train.batch_size_per_gpu=0 must be at least 1"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_all_mistakes_at_once():
    with pytest.raises(ValueError) as caught:
        load_config(None, ["optim.warmup_steps=200000", "crops.global_crops_size=225"])
    assert "warmup_steps" in str(caught.value) and "global_crops_size" in str(caught.value)


def test_a_disabled_task_is_not_checked():
    load_config(None, ["equivariance.enabled=false", "equivariance.equivariant_dim=9999"])


def test_not_a_yaml_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="must hold sections of keys"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("train: {seed: 3\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))


def leaf_names(cls):
    for field in fields(cls):
        value = field.default_factory() if callable(field.default_factory) else None
        if is_dataclass(value):
            yield from leaf_names(type(value))
        else:
            yield field.name


def test_every_key_is_read_somewhere():
    package = Path(dinov2_eq.__file__).parent
    code = "".join(path.read_text() for path in package.rglob("*.py") if path.parent.name != "config")
    unread = [name for name in leaf_names(Config) if f".{name}" not in code]
    assert not unread


def test_plain_dict():
    assert to_dict(Config())["student"]["arch"] == "vit_large"
