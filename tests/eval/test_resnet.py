"""A ResNet that was trained here, in every evaluation, the report and the exporter."""

import json

import pytest
import torch
import torchvision

from tests.helpers import TINY, in_this_process

DATA = ["--train-dataset", "Shapes:split=TRAIN:num=40:size=32", "--val-dataset", "Shapes:split=VAL:num=16:size=32"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resnet")
    overrides = ["student.arch=resnet18", "ibot.loss_weight=0", "equivariance.enabled=false", "optim.steps=2"]
    assert in_this_process(["train", "--config-file", "debug", "--output-dir", str(folder), *TINY, *overrides]) == 0
    return folder


def evaluate(name, folder, out, *flags):
    words = ["eval", name, "--encoder", str(folder), "--output-dir", str(out), *DATA, "--num-workers", "0", *flags]
    return in_this_process(words)


def test_evaluations(run_folder, tmp_path, capsys):
    assert evaluate("knn", run_folder, tmp_path, "--nb_knn", "3") == 0
    assert evaluate("logreg", run_folder, tmp_path, "--max-train-iters", "5") == 0
    heads = ["--epochs", "1", "--epoch-length", "2", "--learning-rates", "0.01"]
    assert evaluate("linear", run_folder, tmp_path, *heads, "--n-last-blocks", "1") == 0
    assert evaluate("equivariance", run_folder, tmp_path, "--tasks", "rotation", "--epochs", "1") == 0
    found = {path.name for path in tmp_path.glob("*.json")}
    assert found == {f"results_eval_{name}.json" for name in ("knn", "logreg", "linear", "equivariance")}
    assert json.loads((tmp_path / "results_eval_knn.json").read_text())["encoder"]["embed_dim"] == 512
    assert evaluate("linear", run_folder, tmp_path, *heads, "--n-last-blocks", "1", "4") == 2
    assert "4 stages have different widths, [64, 128, 256, 512]" in capsys.readouterr().err


def test_torchvision_loads_the_teacher(run_folder):
    (file,) = run_folder.glob("eval/*/teacher_checkpoint.pth")
    teacher = torch.load(file, weights_only=True)["teacher"]
    weights = {name.removeprefix("backbone."): value for name, value in teacher.items() if name.startswith("backbone.")}
    misfit = torchvision.models.resnet18().load_state_dict(weights, strict=False)
    assert misfit.missing_keys == ["fc.weight", "fc.bias"] and not misfit.unexpected_keys
    assert weights["bn1.num_batches_tracked"] == 4  # global and local crops, two steps
    assert (weights["bn1.running_var"] != 1).all()


def test_the_exporter_says_what_it_can(run_folder, tmp_path, capsys):
    assert in_this_process(["export", str(run_folder), "--to", "timm", "--output-dir", str(tmp_path / "out")]) == 2
    assert "is a resnet18; only vision transformers can be exported" in capsys.readouterr().err
