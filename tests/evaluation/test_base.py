"""An evaluation is one file and one entry, and evaluations of one encoder share features."""

import json

import pytest
import torch

from dinov2_eq.evaluation import EVALUATIONS, Program
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.probes import features
from dinov2_eq.run import cli
from tests.helpers import in_this_process, stand_in_for_programs

ENCODER = "random:vit_tiny/16@32"
TRAIN, VAL = "Shapes:split=TRAIN:num=24:size=32", "Shapes:split=VAL:num=12:size=32"
DATA = ["--train-dataset", TRAIN, "--val-dataset", VAL, "--num-workers", "0"]


@pytest.fixture
def entry(monkeypatch):
    program = Program("tests.evaluation.toy", "a toy")
    monkeypatch.setitem(EVALUATIONS, "toy", program)
    monkeypatch.setitem(cli.COMMANDS, "eval toy", program)


@pytest.fixture
def encoded(monkeypatch):
    """The number of images in each forward."""
    numbers, original = [], features.pooled_features

    def count(backbone, images, **how):
        numbers.append(len(images))
        return original(backbone, images, **how)

    monkeypatch.setattr("dinov2_eq.evaluation.features.pooled_features", count)
    return numbers


def results(folder, name):
    return json.loads((folder / f"results_eval_{name}.json").read_text())


def test_the_toy_runs(entry, tmp_path, capsys):
    assert in_this_process(["eval", "toy", "--encoder", ENCODER, "--output-dir", str(tmp_path), *DATA]) == 0
    found = results(tmp_path, "toy")
    assert found["protocol"]["num_val_images"] == 12 and found["protocol"]["seconds"] >= 0
    assert f"mean norm {found['results']['mean_norm']:.4f}" in capsys.readouterr().out
    assert (
        in_this_process(["eval", "toy", "--encoder", ENCODER, "--output-dir", str(tmp_path / "dry"), "--dry-run"]) == 2
    )


def test_eval_all_runs_the_toy_and_shares_features(entry, encoded, tmp_path, monkeypatch):
    calls = stand_in_for_programs(monkeypatch, in_this_process)
    flags = f"{{train-dataset: '{TRAIN}', val-dataset: '{VAL}', num-workers: 0"
    (tmp_path / "list.yaml").write_text(
        f"encoders: {{random: '{ENCODER}'}}\n"
        f"evaluations:\n  knn: {flags}, nb_knn: 3}}\n  again: {flags}, program: knn, nb_knn: 5}}\n  toy: {flags}}}\n"
    )
    command = ["eval", "all", "--config-file", str(tmp_path / "list.yaml"), "--output-dir", str(tmp_path / "out")]
    assert in_this_process(command) == 0
    assert [call[1] for call in calls] == ["knn", "knn", "toy"]
    assert sum(encoded) == 24 + 12  # of three evaluations together
    assert "mean_norm" in (tmp_path / "out/summary.md").read_text()
    assert not list((tmp_path / "out").rglob(".features*"))


def test_shared_features_are_those_of_the_same_weights_and_images(encoded, tmp_path):
    def knn(name, encoder=ENCODER, *more):
        folders = ["--output-dir", str(tmp_path / name), "--features-dir", str(tmp_path / "features")]
        assert in_this_process(["eval", "knn", "--encoder", encoder, *folders, *DATA, "--nb_knn", "3", *more]) == 0
        number = sum(encoded)
        encoded.clear()
        return number, results(tmp_path / name, "knn")["results"]

    first = knn("first")
    assert first == (36, knn("alone", ENCODER, "--precision", "fp32")[1])
    assert knn("same") == (0, first[1])
    assert knn("other size", "random:vit_tiny/16@48")[0] == 36
    assert knn("fewer images", ENCODER, "--max-images", "22")[0] == 22
    assert knn("half", ENCODER, "--precision", "bf16")[0] == 36
    backbone = load_encoder(ENCODER).backbone
    with torch.no_grad():
        backbone.norm.bias += 1
    torch.save(backbone.state_dict(), tmp_path / "changed.pth")
    assert knn("changed", str(tmp_path / "changed.pth"))[0] == 36
