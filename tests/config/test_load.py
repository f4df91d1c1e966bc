"""Config: merging, and every mistake named with key, value and fix."""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

import dinov2_eq
from dinov2_eq.config.load import find_recipe, load_config, to_dict, to_yaml
from dinov2_eq.config.schema import default_config

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").rglob("*.yaml"))


def test_defaults_need_no_file():
    assert load_config(None) == default_config()


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


def test_a_base_is_a_file_or_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("base: debug\ntrain: {seed: 5}\n")
    assert load_config("run.yaml") == load_config("debug", ["train.seed=5"])
    (tmp_path / "run.yaml").write_text("base: cifar10/base\n")
    assert load_config("run.yaml") == load_config("cifar10/base")
    (tmp_path / "debug").write_text("train: {seed: 9}\n")  # a file goes before a recipe
    (tmp_path / "run.yaml").write_text("base: debug\n")
    assert load_config("run.yaml") == load_config(None, ["train.seed=9"])


def test_later_bases_override_earlier_ones(tmp_path):
    (tmp_path / "first.yaml").write_text("train: {seed: 3, batch_size_per_gpu: 8}\n")
    (tmp_path / "second.yaml").write_text("base: first.yaml\ntrain: {seed: 4}\n")
    (tmp_path / "run.yaml").write_text("base: [debug, first.yaml, second.yaml]\noptim: {steps: 7}\n")
    expected = ["train.seed=4", "train.batch_size_per_gpu=8", "optim.steps=7"]
    assert load_config(str(tmp_path / "run.yaml")) == load_config("debug", expected)


def test_what_two_bases_are_based_on_is_read_once(tmp_path):
    """The second does not take back what the first changed in it."""
    (tmp_path / "run.yaml").write_text("base: [cifar10/simclr_eq, cifar10/ibot]\n")
    config = load_config(str(tmp_path / "run.yaml"))
    assert config.equivariance.enabled and config.ibot.loss_weight == 1


def test_the_papers_task_goes_on_top_of_any_recipe(tmp_path):
    (tmp_path / "run.yaml").write_text("base: [ibot_vits16, paper_task]\n")
    config, plain = load_config(str(tmp_path / "run.yaml")), load_config("ibot_vits16")
    form = {"enabled": True, "view": "second", "invariant_projection": True, "loss_weight": 1.0, "decoder": "conv"}
    assert config == replace(plain, equivariance=replace(plain.equivariance, **form, decoder_depth=2))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a": "base: a.yaml"}, "a.yaml: base is circular: .*a.yaml -> .*a.yaml; remove one of them$"),
        ({"a": "base: b.yaml", "b": "base: c.yaml", "c": "base: ./b.yaml"}, "b.yaml -> .*c.yaml -> .*b.yaml; remove"),
        ({"a": "base: nowhere.yaml"}, "a.yaml: base: nowhere.yaml: no such file; packaged recipes are .*debug"),
        ({"a": "base: ."}, r"a.yaml: base: \.: a folder; packaged recipes"),
        *(
            ({"a": f"base: {base}"}, r"a.yaml: base=.* must be the path of a YAML file or the name of a packaged rec")
            for base in ("3", "[debug, 3]", "[]", "{train: {seed: 1}}", "", "''", "true")
        ),
        ({"a": "base: b.yaml", "b": "- 1"}, "b.yaml must hold sections of keys"),
        ({"a": "base: b.yaml", "b": "train: {sed: 1}"}, "b.yaml: unknown key 'train.sed'"),
    ],
)
def test_bases_that_cannot_be(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(f"{text}\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        load_config(str(tmp_path / "a.yaml"))
    assert str(tmp_path) in str(caught.value)


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: 3", "'train' is a section with keys below it, such as 'train.dataset_path', but holds 3"),
        ("train: [1, 2]", r"'train' is a section .* but holds \[1, 2\]"),
        ("optim:", "'optim' is a section with keys below it, such as 'optim.steps', but holds nothing"),
        ("optim: {}", "'optim' is a section .* but holds nothing"),
        ("compute_precision: {teacher: }", "'compute_precision.teacher' is a section .* but holds nothing"),
        ("train.seed: 3", "'train.seed' is not one key; write 'train:', and 'seed: ...' below it"),
        ("1: {seed: 3}", "unknown key '1.seed'"),
        ("train: {1: 3}", "unknown key 'train.1'"),
        ("train: {seed: {a: 3}}", "unknown key 'train.seed.a'"),
        ("word", "unknown key 'word'"),
        ("train: {seed: }", "wrong value for train.seed: it is empty"),
        ("train: {seed: '${nowhere}'}", "wrong value for train.seed: Interpolation key 'nowhere' not found"),
        ("train: {seed: '${train.seed}'}", "wrong value for train.seed: Recursive interpolation"),
        ("train: {seed: '???'}", "wrong value for train.seed: .* missing mandatory value"),
        ("crops: {jitter: [1, 2, 3, x]}", "wrong value for crops.jitter: Value 'x'"),
        ("optim: {steps: 0}", "The config cannot run:\n  - optim.steps=0"),
    ],
)
def test_files_with_a_mistake(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(f"{text}\n")
    with pytest.raises(ValueError, match=f"^{path}: {message}"):
        load_config(str(path))


def test_an_interpolation_is_resolved_over_all_sources(tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {warmup_steps: '${optim.freeze_last_layer_steps}'}\n")
    assert load_config(str(tmp_path / "run.yaml"), ["optim.freeze_last_layer_steps=77"]).optim.warmup_steps == 77


def test_every_unknown_key_is_named_with_its_source(tmp_path):
    (tmp_path / "base.yaml").write_text("train: {sed: 3}\n")
    (tmp_path / "run.yaml").write_text("base: base.yaml\ntrain: {batchsize: 3}\nstudnt: {arch: vit_tiny}\n")
    with pytest.raises(ValueError) as caught:
        load_config(str(tmp_path / "run.yaml"), ["train.seeed=4", "train.workers=0"])
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0].rpartition("/")[2] for line in lines] == [
        "base.yaml",
        "run.yaml",
        "run.yaml",
        "command line",
        "command line",
    ]
    for line, key in zip(lines, ("train.sed", "train.batchsize", "studnt.arch", "train.seeed", "train.w"), strict=True):
        assert f"unknown key '{key}" in line


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("optim.warmup_step", "Did you mean 'optim.warmup_steps'?"),
        ("optim.warmup_epoch", "Did you mean 'optim.warmup_epochs'?"),
        ("optim.epoch", "Did you mean 'optim.epochs'?"),
        # Another unit: the factor is said.
        ("optim.warmup_iters", "'optim.warmup_steps', which counts optimizer steps (an epoch of DINOv2 has 1250)?"),
        ("optim.freeze_backbone_epochs", "'optim.freeze_backbone_steps', which counts optimizer steps (an epoch of"),
        ("train.checkpoint_period_epochs", "'train.checkpoint_period_steps', which counts optimizer steps (an epoch"),
        ("train.lost_rank_timeout_min", "'train.lost_rank_timeout_s', which is in seconds?"),
        ("equivariance.max_angle_rad", "'equivariance.max_angle_deg', which is in degrees?"),
        # Another thing: nothing is suggested.
        ("optim.max_lr", "See 'dinov2-eq train --print-config'"),
        ("equivariance.min_shift", "See 'dinov2-eq train --print-config'"),
        ("crops.global_scale_max", "See 'dinov2-eq train --print-config'"),
    ],
)
def test_hints_do_not_mislead(key, hint):
    with pytest.raises(ValueError, match=re.escape(hint)) as caught:
        load_config(None, [f"{key}=3"])
    assert "\n" not in str(caught.value)


def test_a_folder_and_names_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r": a folder; packaged recipes are .*debug.* path of a YAML file"):
        load_config(str(tmp_path))


def test_every_key_is_read_somewhere():
    """As an attribute of something, or by its name where a backbone is rebuilt from a checkpoint."""
    code = "".join(path.read_text() for path in Path(dinov2_eq.__file__).parent.rglob("*.py"))
    for section, values in to_dict(default_config()).items():
        for key in values:
            assert re.search(rf"\w\.{key}\b", code) or f'"{key}"' in code, f"{section}.{key}"


def test_every_recipe_is_packaged():
    root = Path(__file__).parents[2]
    keywords = [node for node in ast.walk(ast.parse((root / "setup.py").read_text())) if isinstance(node, ast.keyword)]
    package_data = next(ast.literal_eval(node.value) for node in keywords if node.arg == "package_data")
    packaged = {path for pattern in package_data["dinov2_eq.configs"] for path in (root / "configs").glob(pattern)}
    assert packaged == set((root / "configs").rglob("*.yaml"))


def test_plain_dict():
    assert to_dict(default_config())["student"]["arch"] == "vit_large"
