"""DINOv2's own configs and command lines: what they become, and what is said about it."""

import copy
import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dinov2_eq.config.dinov2 import KEYS, NO_MEANING, PARTS
from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.models import ARCHS
from dinov2_eq.train.train import main

# Differences from DINOv2's defaults, as its three training configs have them.
LARGE = {
    "dino": {"head_n_prototypes": 131072, "head_bottleneck_dim": 384},
    "ibot": {"separate_head": True, "head_n_prototypes": 131072, "head_bottleneck_dim": 256},
    "train": {"batch_size_per_gpu": 32, "dataset_path": "ImageNet22k:split=TRAIN", "centering": "sinkhorn_knopp"},
    "student": {
        "arch": "vit_large",
        "patch_size": 14,
        "drop_path_rate": 0.4,
        "ffn_layer": "swiglufused",
        "block_chunks": 4,
    },
    "teacher": {"momentum_teacher": 0.994},
    "optim": {
        "epochs": 500,
        "weight_decay_end": 0.2,
        "base_lr": 2.0e-4,
        "warmup_epochs": 80,
        "layerwise_decay": 1.0,
    },
    "crops": {"local_crops_size": 98},
}
GIANT = copy.deepcopy(LARGE)
GIANT["student"]["arch"] = "vit_giant2"
GIANT["train"] |= {"batch_size_per_gpu": 12, "dataset_path": "ImageNet22k"}
SHORT = {"train": {"batch_size_per_gpu": 64, "dataset_path": "ImageNet:split=TRAIN"}, "student": {"block_chunks": 4}}
CONFIGS = {"vitl16_short": SHORT, "vitl14": LARGE, "vitg14": GIANT}


def resolved() -> dict:
    """The config that DINOv2's trainer writes to its output folder: every key that it has."""

    def part(reduce_dtype: str) -> dict:
        mixed_precision = {"param_dtype": "fp16", "reduce_dtype": reduce_dtype, "buffer_dtype": "fp32"}
        return {"sharding_strategy": "SHARD_GRAD_OP", "mixed_precision": mixed_precision}

    head = {"head_n_prototypes": 65536, "head_bottleneck_dim": 256, "head_nlayers": 3, "head_hidden_dim": 2048}
    return {
        "MODEL": {"WEIGHTS": ""},
        "compute_precision": {
            "grad_scaler": True,
            "teacher": {name: part("fp16") for name in ("backbone", "dino_head", "ibot_head")},
            "student": {"backbone": part("fp16"), "dino_head": part("fp32"), "ibot_head": part("fp32")},
        },
        "dino": {"loss_weight": 1.0, "koleo_loss_weight": 0.1} | head,
        "ibot": {"loss_weight": 1.0, "mask_sample_probability": 0.5, "mask_ratio_min_max": [0.1, 0.5]}
        | {"separate_head": False}
        | head,
        "train": {
            "batch_size_per_gpu": 64,
            "dataset_path": "ImageNet:split=TRAIN",
            "output_dir": "/somewhere",
            "saveckp_freq": 20,
            "seed": 0,
            "num_workers": 10,
            "OFFICIAL_EPOCH_LENGTH": 1250,
            "cache_dataset": True,
            "centering": "centering",
        },
        "student": {
            "arch": "vit_large",
            "patch_size": 16,
            "drop_path_rate": 0.3,
            "layerscale": 1.0e-5,
            "drop_path_uniform": True,
            "pretrained_weights": "",
            "ffn_layer": "mlp",
            "block_chunks": 4,
            "qkv_bias": True,
            "proj_bias": True,
            "ffn_bias": True,
            "num_register_tokens": 0,
            "interpolate_antialias": False,
            "interpolate_offset": 0.1,
        },
        "teacher": {
            "momentum_teacher": 0.992,
            "final_momentum_teacher": 1,
            "warmup_teacher_temp": 0.04,
            "teacher_temp": 0.07,
            "warmup_teacher_temp_epochs": 30,
        },
        "optim": {
            "epochs": 100,
            "weight_decay": 0.04,
            "weight_decay_end": 0.4,
            "base_lr": 0.004,
            "lr": 0.0056568542,
            "warmup_epochs": 10,
            "min_lr": 1.0e-6,
            "clip_grad": 3.0,
            "freeze_last_layer_epochs": 1,
            "scaling_rule": "sqrt_wrt_1024",
            "patch_embed_lr_mult": 0.2,
            "layerwise_decay": 0.9,
            "adamw_beta1": 0.9,
            "adamw_beta2": 0.999,
        },
        "crops": {
            "global_crops_scale": [0.32, 1.0],
            "local_crops_number": 8,
            "local_crops_scale": [0.05, 0.32],
            "global_crops_size": 224,
            "local_crops_size": 96,
        },
        "evaluation": {"eval_period_iterations": 12500},
    }


class Read:
    """A config of these settings, and what was said."""

    def __init__(self, tmp_path, settings: dict | None, *overrides: str, name: str = "theirs.yaml") -> None:
        self.notes: list[str] = []
        path = tmp_path / name
        if settings is not None:
            OmegaConf.save(OmegaConf.create(settings), path)
        self.config = load_config(None if settings is None else str(path), overrides, self.notes.append)

    @property
    def lengths(self) -> tuple[int, int, int, int]:
        optim, teacher = self.config.optim, self.config.teacher
        return optim.steps, optim.warmup_steps, optim.freeze_last_layer_steps, teacher.warmup_teacher_temp_steps


@pytest.fixture
def read(tmp_path):
    return lambda *arguments, **more: Read(tmp_path, *arguments, **more)


@pytest.mark.parametrize("settings", [SHORT, resolved()], ids=["differences", "resolved"])
def test_the_short_recipe_is_the_packaged_one(read, settings):
    theirs, ours = to_dict(read(settings).config), to_dict(load_config("vitl16_short"))
    assert ours["student"]["ffn_layer"] is None and ARCHS[ours["student"]["arch"]].ffn_layer == "mlp"
    ours["student"]["ffn_layer"] = "mlp"  # the architecture's own
    different = {
        f"{section}.{key}" for section in ours for key in ours[section] if theirs[section][key] != ours[section][key]
    }
    assert different == {"train.accumulation_steps", "train.dataset_path"}


@pytest.mark.parametrize(("name", "arch", "batch_size"), [("vitl14", "vit_large", 32), ("vitg14", "vit_giant2", 12)])
def test_the_large_recipes(read, name, arch, batch_size):
    found = read(CONFIGS[name])
    student, optim, config = found.config.student, found.config.optim, found.config
    assert (student.arch, student.patch_size, student.ffn_layer) == (arch, 14, "swiglufused")
    assert found.lengths == (625000, 100000, 1250, 37500)
    assert (optim.base_lr, optim.weight_decay_end, optim.layerwise_decay) == (2e-4, 0.2, 1.0)
    assert (config.dino.head_bottleneck_dim, config.ibot.head_bottleneck_dim) == (384, 256)
    assert config.ibot.separate_head and config.train.centering == "sinkhorn_knopp"
    assert config.train.batch_size_per_gpu == batch_size and not config.equivariance.enabled


@pytest.mark.parametrize("name", CONFIGS)
def test_they_are_printed_and_planned(tmp_path, capsys, name):
    path = tmp_path / f"{name}.yaml"
    OmegaConf.save(OmegaConf.create(CONFIGS[name]), path)
    main(["--config-file", str(path), "--print-config"])
    printed = capsys.readouterr()
    assert "block_chunks (each block is sharded by itself)" in printed.err
    (tmp_path / "printed.yaml").write_text(printed.out)  # YAML alone
    assert load_config(str(tmp_path / "printed.yaml")) == load_config(str(path))
    shallow = ["student.depth=1", "train.dataset_path=Shapes:split=TRAIN:num=640"]
    main(["--config-file", str(path), "--dry-run", *shallow])
    plan = capsys.readouterr().out
    steps = 125000 if name == "vitl16_short" else 625000
    assert f"steps              {steps}" in plan and "passes over 640" in plan and "block_chunks (each" in plan


def test_a_config_for_evaluations(read):
    student = {"arch": "vit_large", "patch_size": 14, "num_register_tokens": 4, "interpolate_antialias": True}
    student |= {"interpolate_offset": 0.0, "block_chunks": 0}
    config = read({"student": student, "crops": {"global_crops_size": 518, "local_crops_size": 98}}).config
    assert (config.student.ffn_layer, config.crops.global_crops_size) == ("mlp", 518)


def test_what_is_said_about_a_resolved_config(read):
    reading, left_out, plain = read(resolved()).notes
    for words in (
        "an epoch is 1250 steps",
        "optim.epochs=100 is optim.steps=125000",
        "teacher.warmup_teacher_temp_epochs=30 is teacher.warmup_teacher_temp_steps=37500",
        "compute_precision.*.*.sharding_strategy=SHARD_GRAD_OP is fsdp.strategy=grad_op",
    ):
        assert words in reading
    for key in ("grad_scaler", "reduce_dtype", "buffer_dtype", "param_dtype=fp16", "saveckp_freq", "cache_dataset"):
        assert left_out.count(key) == 1
    for key in ("train.output_dir (see --output-dir)", "student.block_chunks (", "optim.lr ("):
        assert left_out.count(key) == 1
    assert "theirs.yaml" in plain and "equivariance.enabled=true to add" in plain


def test_a_config_of_this_project_is_said_nothing_about(read):
    assert read({"optim": {"steps": 200000}}).notes == []


def test_every_key_is_known_and_none_is_of_the_schema():
    def leaves(values, prefix=""):
        for key, value in values.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [f"{prefix}{key}"]

    ours = set(leaves(to_dict(load_config(None))))
    assert set(leaves(resolved())) - ours == KEYS and not KEYS & ours


def test_the_page_names_every_key_without_a_meaning():
    page = (Path(__file__).parents[2] / "docs" / "from_dinov2.md").read_text(encoding="utf-8")
    sentence = page.partition("These mean nothing here")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", sentence)) == {key.rpartition(".")[2] for key in NO_MEANING}


@pytest.mark.parametrize(
    ("settings", "overrides", "lengths"),
    [
        ({"optim": {"epochs": 200}}, [], (250000, 12500, 1250, 37500)),
        ({"train": {"OFFICIAL_EPOCH_LENGTH": 500}}, [], (50000, 5000, 500, 15000)),
        ({"optim": {"epochs": 80}, "train": {"OFFICIAL_EPOCH_LENGTH": 500}}, [], (40000, 5000, 500, 15000)),
        ({"optim": {"epochs": 50, "warmup_epochs": 0.5, "freeze_last_layer_epochs": 0}}, [], (62500, 625, 0, 37500)),
        # The epoch's length from one source, the epochs from another.
        ({"train": {"OFFICIAL_EPOCH_LENGTH": 500}}, ["optim.epochs=40"], (20000, 5000, 500, 15000)),
        ({"optim": {"epochs": 40}}, ["train.OFFICIAL_EPOCH_LENGTH=500"], (20000, 5000, 500, 15000)),
        # The later source wins, whichever the unit.
        ({"optim": {"epochs": 200}}, ["optim.steps=40000"], (40000, 12500, 1250, 37500)),
        ({"optim": {"steps": 99000}}, ["optim.epochs=40"], (50000, 12500, 1250, 37500)),
        ({"optim": {"steps": 99000}}, ["train.OFFICIAL_EPOCH_LENGTH=500"], (99000, 5000, 500, 15000)),
        (None, ["optim.epochs=40", "teacher.warmup_teacher_temp_epochs=2.5"], (50000, 12500, 1250, 3125)),
    ],
)
def test_epochs_become_steps(read, settings, overrides, lengths):
    assert read(settings, *overrides).lengths == lengths


def test_epochs_over_a_recipe():
    config = load_config("debug", ["optim.epochs=0.01", "train.OFFICIAL_EPOCH_LENGTH=1000"])
    assert (config.optim.steps, config.optim.warmup_steps) == (10, 2)


def test_a_length_without_use_is_named(read):
    steps = [f"optim.{key}=10" for key in ("steps", "warmup_steps", "freeze_last_layer_steps")]
    found = read(None, *steps, "teacher.warmup_teacher_temp_steps=10", "train.OFFICIAL_EPOCH_LENGTH=7")
    assert found.lengths == (10, 10, 10, 10)
    assert "train.OFFICIAL_EPOCH_LENGTH (all lengths are given in steps)" in found.notes[0]


def test_what_is_overridden_is_not_said_to_count(read):
    assert "optim.epochs" not in read({"optim": {"epochs": 200}}, "optim.steps=40000").notes[0]


@pytest.mark.parametrize(
    ("settings", "overrides", "message"),
    [
        ({"optim": {"epochs": 3, "steps": 4}}, [], "theirs.yaml: optim.epochs=3 and optim.steps=4 set the same"),
        ({"optim": {"epochs": 3, "steps": 4}}, ["optim.epochs=5"], "optim.epochs=3 and optim.steps=4 set the same"),
        (
            None,
            ["optim.warmup_epochs=3", "optim.warmup_steps=4"],
            "command line: optim.warmup_epochs=3 and optim.warmup",
        ),
        (
            {"evaluation": {"eval_period_iterations": 3, "eval_period_steps": 4}},
            [],
            "eval_period_iterations=3 and eval",
        ),
        (
            {"MODEL": {"WEIGHTS": "a.pth"}, "student": {"pretrained_weights": "b.pth"}},
            [],
            "MODEL.WEIGHTS=a.pth and student.pretrained_weights=b.pth",
        ),
        ({"optim": {"epochs": "many"}}, [], "theirs.yaml: optim.epochs='many' must be a number in"),
        ({"optim": {"epochs": None}}, [], "optim.epochs=None must be a number"),
        ({"optim": {"epochs": [1]}}, [], r"optim.epochs=\[1\] must be a number"),
        ({"optim": {"warmup_epochs": True}}, [], "optim.warmup_epochs=True must be a number"),
        (None, ["optim.epochs=-1"], "command line: optim.epochs=-1 must be a number"),
        (None, ["optim.epochs=.nan"], "optim.epochs=nan must be a number"),
        (None, ["optim.epochs=.inf"], "optim.epochs=inf must be a number"),
        (None, ["train.OFFICIAL_EPOCH_LENGTH=0"], r"OFFICIAL_EPOCH_LENGTH=0 must be a number in \[1,"),
        (None, ["evaluation.eval_period_iterations=never"], "eval_period_iterations='never' must be a number"),
        (
            {"compute_precision": {"student": {"backbone": {"sharding_strategy": "FULL"}}}},
            [],
            "student.backbone.sharding_strategy='FULL' is not one of NO_SHARD, SHARD_GRAD_OP",
        ),
        # A rule that is broken in steps, explained to who wrote epochs.
        (LARGE, ["optim.epochs=50"], r"(?s)optim.warmup_steps=100000 is more than .*optim.warmup_epochs=80 is optim"),
    ],
)
def test_mistakes(read, settings, overrides, message):
    with pytest.raises(ValueError, match=message):
        read(settings, *overrides)


def parts(setting: str, *values: object) -> list[str]:
    """One value for all parts, or one for each."""
    return [f"{part}.{setting}={value}" for part, value in zip(PARTS, values * (6 // len(values)), strict=True)]


@pytest.mark.parametrize(
    ("given", "strategy"),
    [("NO_SHARD", "ddp"), ("SHARD_GRAD_OP", "grad_op"), ("FULL_SHARD", "full"), ("HYBRID_SHARD", "hybrid")],
)
def test_sharding(read, given, strategy):
    found = read(None, *parts("sharding_strategy", given))
    assert found.config.fsdp.strategy == strategy and f"={given} is fsdp.strategy={strategy}" in found.notes[0]


def test_sharding_that_differs_from_part_to_part(read):
    mixed = parts("sharding_strategy", "FULL_SHARD", "NO_SHARD")
    found = read({"fsdp": {"strategy": "hybrid"}}, *mixed)
    assert found.config.fsdp.strategy == "hybrid"
    assert "sharding_strategy=FULL_SHARD and NO_SHARD (fsdp.strategy applies to all parts)" in found.notes[0]
    # A part that is not named has DINOv2's default.
    found = read(None, "compute_precision.student.backbone.sharding_strategy=FULL_SHARD")
    assert "FULL_SHARD and SHARD_GRAD_OP" in found.notes[0]
    found = read(None, "compute_precision.student.backbone.sharding_strategy=SHARD_GRAD_OP")
    assert "=SHARD_GRAD_OP is fsdp.strategy=grad_op" in found.notes[0]


def test_precision(read):
    for given, dtype in (("bf16", "bf16"), ("fp32", "fp32"), ("fp16", "auto")):
        found = read(None, *parts("mixed_precision.param_dtype", given))
        assert found.config.compute_precision.dtype == dtype
    assert "param_dtype=fp16 (no fp16 here, see compute_precision.dtype)" in found.notes[0]
    found = read(None, *parts("mixed_precision.param_dtype", "bf16", "fp16"))
    assert found.config.compute_precision.dtype == "auto"
    assert "param_dtype=bf16 and fp16 (compute_precision.dtype applies to all parts)" in found.notes[0]


def test_weights_to_start_from(read):
    settings = {"MODEL": {"WEIGHTS": "a.pth"}}
    assert read(settings).config.student.pretrained_weights == "a.pth"
    assert read(settings, "student.pretrained_weights=b.pth").config.student.pretrained_weights == "b.pth"
    assert read(settings, "MODEL.WEIGHTS=").config.student.pretrained_weights == ""
    found = read({"MODEL": {"WEIGHTS": None}, "student": {"pretrained_weights": "b.pth"}})
    assert found.config.student.pretrained_weights == "b.pth"


def test_other_words(read):
    assert read(None, "student.arch=vit_giant2_memeff").config.student.arch == "vit_giant2"
    for given, period in ((12500, 12500), (0, 0), (-1, 0)):
        found = read({"evaluation": {"eval_period_iterations": given}})
        assert found.config.evaluation.eval_period_steps == period


def test_defaults_that_are_not_those_of_the_schema(read):
    config = read({"student": {"arch": "vit_giant2", "block_chunks": 4}}).config
    assert (config.student.ffn_layer, config.train.dataset_path) == ("mlp", "ImageNet:split=TRAIN")


def test_the_task_is_switched_on_by_who_asks_for_it(read):
    assert not read(SHORT).config.equivariance.enabled
    for setting in ("enabled=true", "loss_weight=2"):
        found = read(SHORT, f"equivariance.{setting}")
        assert found.config.equivariance.enabled and len(found.notes) == 1
    assert read(SHORT | {"equivariance": {"border": "zeros"}}).config.equivariance.enabled
    read(SHORT, name="base.yaml")
    assert not read({"base": "base.yaml", "train": {"seed": 1}}).config.equivariance.enabled
    assert read({"base": "vitl16_eq_short", "optim": {"epochs": 90}}).config.equivariance.enabled
    assert read(None, "optim.epochs=200").config.equivariance.enabled  # typed, and no file of DINOv2's
