import json

import pytest
import torch

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.eval import equivariance
from dinov2_eq.models import build_backbone

BORDERS = {
    "rotation": ["zeros", "masked", "canvas"],
    "translation": ["zeros", "masked", "canvas"],
    "color_jitter": ["none", "masked"],
    "blur": ["none", "masked"],
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    path = folder / "eval" / "training_3" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True)
    torch.save({"teacher": weights, "config": to_dict(load_config("debug", ["student.depth=1"])), "step": 3}, path)
    return folder


def run(run_folder, *flags):
    data = ["--train-dataset", "Shapes:split=TRAIN:num=16:size=32", "--val-dataset", "Shapes:split=VAL:num=12:size=32"]
    small = ["--hidden-dim", "16", "--epochs", "2", "--num-workers", "0", "--device", "cpu"]
    equivariance.main(["--pretrained-weights", str(run_folder), *data, *small, *flags])
    return json.loads((run_folder / "results_eval_equivariance.json").read_text())


def test_all_tasks_borders_and_both_encoders(run_folder, capsys):
    results = run(run_folder, "--draws", "2")
    found = [(row["encoder"], row["task"], row["border"]) for row in results["rows"]]
    names = ("trained", "random-init")
    assert found == [(name, task, border) for name in names for task, borders in BORDERS.items() for border in borders]
    assert set(results["rows"][6]["r2_components"]) == {"brightness", "contrast", "saturation", "hue"}
    assert [(mean["encoder"], mean["name"]) for mean in results["summary"]] == [
        (name, mean) for name in names for mean in ("mean_border_free", "mean_zeros", "mean_masked")
    ]
    rows = {(row["task"], row["border"]): row["r2_pooled"] for row in results["rows"][:10]}
    border_free = [("rotation", "canvas"), ("translation", "canvas"), ("color_jitter", "none"), ("blur", "none")]
    assert results["summary"][0]["r2_pooled"] == pytest.approx(sum(rows[key] for key in border_free) / 4)
    assert results["protocol"]["draws"] == 2 and results["protocol"]["num_val_images"] == 12
    assert results["protocol"]["mask_radius_px"]["rotation"] == 15.5
    output = capsys.readouterr().out
    assert "random-init R2 mean" in output and "mean_masked" in output
    assert output.rstrip().endswith(str(run_folder / "results_eval_equivariance.json"))


def test_one_task_without_random_init_and_with_seeds(run_folder):
    flags = ["--tasks", "translation", "--no-random-init", "--num-seeds", "2", "--max-shift", "0.2", "--tokens", "cls"]
    results = run(run_folder, *flags, "--head", "linear", "--max-train-images", "10")
    assert [row["border"] for row in results["rows"]] == BORDERS["translation"]
    assert results["rows"][0]["r2_pooled_std"] > 0 and results["summary"] == []
    assert results["protocol"]["num_train_images"] == 10 and results["protocol"]["max_shift"] == 0.2


def test_same_numbers_twice(run_folder):
    first, second = (run(run_folder, "--tasks", "blur", "--no-random-init")["rows"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tasks", "rotaton"], "Unknown transform 'rotaton'"),
        (["--tasks", "blur", "--blur-sigma", "2", "1"], "Task blur has an empty range"),
        (["--max-shift", "0.6"], r"translation: shifts up to 0\.6"),
    ],
)
def test_mistakes(run_folder, flags, text):
    with pytest.raises(ValueError, match=text):
        run(run_folder, *flags)


def test_wrong_data_is_found_before_any_work(run_folder, monkeypatch):
    monkeypatch.setattr(equivariance, "load_encoder", None)
    with pytest.raises(ValueError, match="unknown dataset 'Nope'"):
        run(run_folder, "--val-dataset", "Nope")
