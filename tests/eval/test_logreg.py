import json
from functools import partial

import pytest
import torch
from sklearn.linear_model import LogisticRegression

from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.data.linear_loader import make_whole_image_loader
from dinov2_eq.eval import logreg
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.probes.features import encode_batches, pooled_features
from tests.processes import run_ranks

ENCODER = "random:vit_tiny/16@32"
SMALL = ["--encoder", ENCODER, "--num-workers", "0", "--device", "cpu", "--max-train-iters", "200"]
SHAPES = {"train": "Shapes:split=TRAIN:num=60:size=32", "val": "Shapes:split=VAL:num=40:size=32"}


def run(folder, data, *flags):
    strings = ["--train-dataset", data["train"], "--val-dataset", data["val"]]
    logreg.main([*SMALL, *strings, "--output-dir", str(folder), *flags])
    return json.loads((folder / "results_eval_logreg.json").read_text())


def test_separable_images_and_what_the_file_says(colours, tmp_path, capsys):
    results = run(tmp_path, colours)
    accuracy = results["results"]["accuracy"][colours["val"]]
    assert accuracy["mean_accuracy"] == accuracy["mean_per_class_accuracy"] == {"top1": 100.0}
    assert len(results["grid"]) == 45 and results["grid"] == sorted(results["grid"], key=lambda row: row["C"])
    best = max(row["top1"] for row in results["grid"])
    assert results["results"]["C"] == next(row["C"] for row in results["grid"] if row["top1"] == best)
    protocol = results["protocol"]
    assert protocol["num_train_images"] == 48 and protocol["num_selection_images"] == 4
    assert "10% of the training images, held out" in protocol["selection"] and protocol["max_train_iters"] == 200
    assert protocol["final_fit"] == "training images and those that chose C"
    output = capsys.readouterr().out
    assert "the images below chose nothing" in output and "100.00" in output


def test_the_final_fit_is_scikit_learns(tmp_path):
    results = run(tmp_path, SHAPES, "--max-train-iters", "2000")
    encoder = load_encoder(ENCODER)
    parts = []
    for images in read_labelled(SHAPES["train"], [SHAPES["val"]], "test"):
        loader = make_whole_image_loader(images.dataset, images.indices, encoder.image_size, 64)
        encode = partial(pooled_features, encoder.backbone, mean=encoder.mean, std=encoder.std)
        features = encode_batches(encode, loader, torch.device("cpu"))
        parts += [features.double().numpy(), images.labels.numpy()]
    train, train_labels, val, val_labels = parts
    oracle = LogisticRegression(C=results["results"]["C"], max_iter=10000, tol=1e-8).fit(train, train_labels)
    expected = 100 * oracle.score(val, val_labels)
    assert results["results"]["accuracy"][SHAPES["val"]]["mean_accuracy"]["top1"] == pytest.approx(expected, abs=2.6)


def test_the_end_of_the_grid_is_told():
    assert logreg.end_of_the_grid(1.0) == []
    (notice,) = logreg.end_of_the_grid(max(logreg.C_GRID))
    assert "C = 1e+05 is the largest that was tried" in notice


def test_other_images_choose(colours, tmp_path, capsys):
    results = run(tmp_path, colours, "--finetune-dataset-str", colours["val"])
    assert results["protocol"]["num_train_images"] == 48 + 22 and results["protocol"]["num_selection_images"] == 22
    results = run(tmp_path, colours, "--finetune-on-val", "--metric-type", "mean_per_class_accuracy")
    assert results["protocol"]["num_train_images"] == 48 and results["protocol"]["num_selection_images"] == 22
    assert results["protocol"]["final_fit"] == "training images" and "optimistic" in results["protocol"]["selection"]
    with pytest.raises(SystemExit):
        run(tmp_path, colours, "--finetune-on-val", "--finetune-dataset-str", colours["val"])
    assert "not allowed with" in capsys.readouterr().err


def test_few_images_float32_and_too_few_steps(colours, tmp_path):
    results = run(tmp_path, colours, "--n-per-class", "3", "--train-dtype", "float32", "--max-train-iters", "1")
    assert results["protocol"]["num_train_images"] == 12 and results["protocol"]["num_selection_images"] == 4
    assert any("fits stopped before they converged" in notice for notice in results["protocol"]["notices"])
    with pytest.raises(ValueError, match="--n-per-class 13 is more than"):
        run(tmp_path, colours, "--n-per-class", "13")


def run_in_a_process(argv):
    logreg.main(argv)


def test_two_processes_equal_one(tmp_path):
    one = run(tmp_path / "one", SHAPES)
    data = ["--train-dataset", SHAPES["train"], "--val-dataset", SHAPES["val"], "--output-dir", str(tmp_path / "two")]
    run_ranks(run_in_a_process, 2, [*SMALL, *data])
    two = json.loads((tmp_path / "two" / "results_eval_logreg.json").read_text())
    assert [row["C"] for row in two["grid"]] == [row["C"] for row in one["grid"]]
    assert two["results"] == one["results"] and two["protocol"]["processes"] == 2
    assert [row["top1"] for row in two["grid"]] == [row["top1"] for row in one["grid"]]


def test_a_dry_run_leaves_nothing(colours, tmp_path):
    strings = ["--train-dataset", colours["train"], "--val-dataset", colours["val"]]
    logreg.main([*SMALL, *strings, "--output-dir", str(tmp_path / "new"), "--dry-run"])
    assert not (tmp_path / "new").exists()
