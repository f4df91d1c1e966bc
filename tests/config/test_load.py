"""Config: merging, and every mistake named with key, value and fix."""

import ast
import re
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
        ("optim.steps=[1", r"'optim.steps=\[1': what follows '=' is not valid YAML; close every bracket"),
        ("train.dataset_path='x", "train.dataset_path='x.* is not valid YAML"),
    ],
)
def test_mistakes_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(None, [override])


def test_not_a_yaml_mapping(tmp_path):
    (tmp_path / "list.yaml").write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match="must hold sections of keys"):
        load_config(str(tmp_path / "list.yaml"))
    (tmp_path / "broken.yaml").write_text("train: {seed: 3\n")
    with pytest.raises(ValueError, match="not valid YAML"):
        load_config(str(tmp_path / "broken.yaml"))


def test_every_key_is_read_somewhere():
    """As `section.key`, or on the short name that dinov2_eq/train gives the section."""
    short = {"equivariance": "task", "student": "settings", "dino": "settings", "ibot": "settings"}
    code = "".join(path.read_text() for path in (Path(dinov2_eq.__file__).parent / "train").rglob("*.py"))
    for section, values in to_dict(Config()).items():
        for key in values:
            assert re.search(rf"\b({section}|{short.get(section, section)})\.{key}\b", code), f"{section}.{key}"


def test_every_recipe_is_packaged():
    root = Path(__file__).parents[2]
    keywords = [node for node in ast.walk(ast.parse((root / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    package_data = next(ast.literal_eval(node.value) for node in keywords if node.arg == "package_data")
    packaged = {path for pattern in package_data["dinov2_eq.configs"] for path in (root / "configs").glob(pattern)}
    assert packaged == set((root / "configs").rglob("*.yaml"))


def test_plain_dict():
    assert to_dict(Config())["student"]["arch"] == "vit_large"
