"""Starting from weights: whose, how many of them, and what starts from scratch."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
import transformers

from dinov2_eq.config.load import to_dict
from dinov2_eq.models import build_backbone
from dinov2_eq.models.weight_files import write_safetensors
from dinov2_eq.train.pretrained import read_pretrained
from dinov2_eq.train.train import do_train
from tests.helpers import PAPERS_FORM, tiny_config
from tests.processes import run_ranks

FROZEN = ["optim.base_lr=1e-12", "optim.min_lr=0", "optim.steps=2", "student.drop_path_rate=0"]


def train(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """Hardly moves, so that the teacher at the end is what it began with; returns its weights."""
    config = tiny_config(*FROZEN, *overrides)
    do_train(config, folder)
    return torch.load(folder / "eval/training_2/teacher_checkpoint.pth", weights_only=True)["teacher"]


def train_only(folder: Path, *overrides: str) -> None:
    train(folder, *overrides)


def log(folder: Path) -> str:
    return (folder / "logs" / "log.0.txt").read_text()


def backbone(teacher: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[9:]: tensor for name, tensor in teacher.items() if name.startswith("backbone.")}


def require_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps with a seed that no other test has."""
    folder = tmp_path_factory.mktemp("run")
    do_train(tiny_config("train.seed=77", "optim.steps=3", "optim.base_lr=0.01"), folder)
    return folder


@pytest.fixture(scope="module")
def trained(run) -> dict[str, torch.Tensor]:
    return torch.load(run / "eval/training_3/teacher_checkpoint.pth", weights_only=True)["teacher"]


def test_our_teacher_checkpoint_with_heads_and_projection(run, trained, tmp_path):
    teacher = train(tmp_path, f"student.pretrained_weights={run}/eval/training_3/teacher_checkpoint.pth")
    require_close(teacher, trained)
    assert "backbone: loaded 21 of 21 tensors" in log(tmp_path)
    assert "dino_head: loaded 8 of 8 tensors" in log(tmp_path) and "projection: loaded 2 of 2" in log(tmp_path)
    assert "objectives.reconstruction starts from scratch: not in" in log(tmp_path)


def test_other_heads_start_afresh(run, trained, tmp_path):
    overrides = [
        f"student.pretrained_weights={run}/eval/training_3/teacher_checkpoint.pth",
        "dino.head_n_prototypes=64",
    ]
    teacher = train(tmp_path, *overrides)
    require_close(backbone(teacher), backbone(trained))
    assert "dino_head starts from scratch: loaded 6 of 8 tensors" in log(tmp_path)


def test_our_training_checkpoint_with_optimizer_and_decoders(run, tmp_path):
    train(tmp_path, f"student.pretrained_weights={run}")
    text = log(tmp_path)
    assert "objectives.reconstruction: loaded" in text
    assert f"the optimizer continues with the moments of {run}/checkpoints/3" in text


def test_a_changed_method_takes_what_it_can_of_a_training_checkpoint(run, tmp_path):
    train(tmp_path, f"student.pretrained_weights={run}/checkpoints/3", *PAPERS_FORM)
    assert "the optimizer starts from scratch" in log(tmp_path) and "backbone: loaded 21 of 21" in log(tmp_path)


def test_two_processes_start_from_the_same_weights(run, trained, tmp_path):
    source = f"student.pretrained_weights={run}/eval/training_3/teacher_checkpoint.pth"
    run_ranks(train_only, 2, tmp_path, source, "train.batch_size_per_gpu=2", "fsdp.strategy=full")
    teacher = torch.load(tmp_path / "eval/training_2/teacher_checkpoint.pth", weights_only=True)["teacher"]
    require_close(teacher, trained)
    run_ranks(train_only, 2, tmp_path / "dcp", f"student.pretrained_weights={run}", "train.batch_size_per_gpu=2")
    assert "the optimizer continues with the moments" in log(tmp_path / "dcp")


def test_a_timm_file_with_other_patches_and_positions(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=1, num_classes=0)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    teacher = train(tmp_path / "run", f"student.pretrained_weights={tmp_path}/timm.pth")
    require_close(backbone(teacher)["blocks.0.mlp.fc1.weight"], model.state_dict()["blocks.0.mlp.fc1.weight"])
    assert "patches of 16 pixels became 8" in log(tmp_path / "run")


def test_a_hugging_face_folder(tmp_path):
    config = transformers.Dinov2Config(
        hidden_size=192, num_hidden_layers=1, num_attention_heads=3, image_size=32, patch_size=8
    )
    model = transformers.Dinov2Model(config)
    model.save_pretrained(tmp_path / "hf")
    teacher = train(tmp_path / "run", f"student.pretrained_weights=hf:{tmp_path}/hf")
    expected = model.state_dict()["encoder.layer.0.mlp.fc1.weight"]
    require_close(backbone(teacher)["blocks.0.mlp.fc1.weight"], expected)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf:{}/half", "missing are layers.1."),
        ("hf:{}/heads", "has 6 attention heads for 192 channels; backbones of this project have 3"),
        ("hf:{}/nowhere", "cannot be loaded"),
        ("timm:vit_smal_patch14_dinov2", "Unknown model"),
    ],
)
def test_models_of_libraries_that_are_not_whole_not_alike_or_not_there(tmp_path, source, message):
    small = {"hidden_size": 192, "num_attention_heads": 3, "image_size": 32, "patch_size": 8, "num_hidden_layers": 1}
    transformers.ViTModel(transformers.ViTConfig(**small)).save_pretrained(tmp_path / "half")
    config = json.loads((tmp_path / "half/config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "half/config.json").write_text(json.dumps(config))
    transformers.ViTModel(transformers.ViTConfig(**small | {"num_attention_heads": 6})).save_pretrained(
        tmp_path / "heads"
    )
    with pytest.raises(ValueError, match=message):
        read_pretrained(source.format(tmp_path))


def test_a_damaged_training_checkpoint(run, tmp_path):
    shutil.copytree(run / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints/3/__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"checkpoints/3 is damaged \(__0_0.distcp is not what was written"):
        train(tmp_path / "run", f"student.pretrained_weights={tmp_path}/checkpoints/3")


def test_our_weights_with_a_config_and_bare_names(trained, tmp_path):
    """As `dinov2-eq export --to safetensors` writes them."""
    header = {"config": json.dumps(to_dict(tiny_config())), "step": "3"}
    write_safetensors(tmp_path / "model.safetensors", backbone(trained), header)
    found = read_pretrained(tmp_path / "model.safetensors")
    assert found.keys() == {"backbone"}
    require_close(found["backbone"], backbone(trained))


def test_backbone_is_frozen_first(tmp_path):
    weights = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    overrides = [
        *(f"student.pretrained_weights={tmp_path}/weights.pth", "optim.steps=4", "optim.base_lr=0.1"),
        *("teacher.momentum_teacher=0", "teacher.final_momentum_teacher=0", "evaluation.eval_period_steps=2"),
        *("optim.freeze_backbone_steps=2", "optim.warmup_steps=0"),
    ]
    do_train(tiny_config(*overrides), tmp_path / "run")
    frozen, free = (
        torch.load(tmp_path / f"run/eval/training_{step}/teacher_checkpoint.pth", weights_only=True)["teacher"]
        for step in (2, 4)
    )
    torch.testing.assert_close(backbone(frozen), weights, rtol=0, atol=0)
    assert (backbone(free)["norm.weight"] - weights["norm.weight"]).abs().max() > 1e-3
    assert (frozen["projection.equivariant.weight"] - free["projection.equivariant.weight"]).abs().max() > 0


def test_knn_is_measured_before_the_first_step_and_a_fall_is_told(tmp_path):
    """A learning rate that destroys the weights."""
    weights = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    data = "Shapes:split=TRAIN:num=48:size=32"
    overrides = [
        *(f"student.pretrained_weights={tmp_path}/weights.pth", "optim.base_lr=1", "optim.warmup_steps=0"),
        *("teacher.momentum_teacher=0", "optim.clip_grad=0", "optim.steps=4", "train.checkpoint_period_steps=2"),
        *("evaluation.knn_period_steps=2", f"evaluation.knn_train_dataset={data}", "evaluation.knn_k=5"),
        f"evaluation.knn_val_dataset={data.replace('TRAIN', 'VAL')}",
    ]
    do_train(tiny_config(*overrides), tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "training_metrics.jsonl").read_text().splitlines()]
    accuracies = [line["eval/knn_top1"] for line in lines if "eval/knn_top1" in line]
    assert len(accuracies) == 3
    fell = [accuracy for accuracy in accuracies[1:] if accuracy < accuracies[0]]
    assert fell and log(tmp_path / "run").count("of student.pretrained_weights: lower optim.base_lr") == len(fell)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.pth", "missing.pth"),
        ("empty", "holds no training checkpoint; give a run folder"),
        ("wide.pth", "pretrained_weights do not fit: .* channels 384 there, 192 here; .* Set student.arch"),
        ("half.pth", r"loaded \d+ of 21 tensors"),
        ("cut.pth", "cut.pth"),
    ],
)
def test_what_does_not_fit_is_refused_and_an_earlier_run_stays(tmp_path, source, message):
    (tmp_path / "empty").mkdir()
    torch.save(build_backbone("vit_small", patch_size=8, img_size=32, depth=1).state_dict(), tmp_path / "wide.pth")
    weights = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1).state_dict()
    torch.save(weights, tmp_path / "whole.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    torch.save(dict(list(weights.items())[:10]), tmp_path / "half.pth")
    do_train(tiny_config("optim.steps=2"), tmp_path / "run")
    with pytest.raises((ValueError, OSError), match=message):
        do_train(tiny_config(f"student.pretrained_weights={tmp_path / source}"), tmp_path / "run", resume=False)
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_where_a_run_came_from_does_not_change(tmp_path):
    do_train(tiny_config("optim.steps=2"), tmp_path)
    with pytest.raises(ValueError, match=r"student\.pretrained_weights was '', now 'other\.pth'"):
        do_train(tiny_config("optim.steps=4", "student.pretrained_weights=other.pth"), tmp_path)
