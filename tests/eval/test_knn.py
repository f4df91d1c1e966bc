import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_distances
from sklearn.neighbors import KNeighborsClassifier

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.data.datasets import DataError
from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.eval import knn
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.evaluation.features import FeatureExtractor
from dinov2_eq.models import build_backbone
from tests.processes import run_ranks

TRAIN, VAL = "Shapes:split=TRAIN:num=48:size=32", "Shapes:split=VAL:num=24:size=32"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    backbone = build_backbone("vit_tiny", patch_size=8, img_size=32, depth=1, layerscale=0)
    weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    config = to_dict(load_config("debug", ["student.depth=1", "student.layerscale=0"]))
    path = folder / "eval" / "training_3" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True)
    torch.save({"teacher": weights, "config": config, "step": 3}, path)
    return folder


def run(run_folder, *flags, train=TRAIN, val=VAL, results=None):
    common = ["--pretrained-weights", str(run_folder), "--num-workers", "0", "--device", "cpu"]
    knn.main([*common, "--train-dataset", train, "--val-dataset", val, *flags])
    return json.loads(((results or run_folder) / "results_eval_knn.json").read_text())


def test_results_file_and_table(run_folder, capsys):
    results = run(run_folder, "--nb_knn", "5", "10", "1000")
    assert set(results["results"]["full"]) == {"5", "10", "48"}  # 1000 was clipped
    assert any("k = 1000 became 48" in notice for notice in results["protocol"]["notices"])
    accuracy = results["results"]["full"]["10"]
    assert set(accuracy) == {"top1", "top5"} and 0 <= accuracy["top1"] <= accuracy["top5"] <= 100
    assert results["protocol"]["num_train_images"] == 48 and results["protocol"]["temperature"] == 0.07
    assert results["encoder"]["step"] == 3
    output = capsys.readouterr().out
    assert "top-1 %" in output and output.rstrip().endswith(str(run_folder / "results_eval_knn.json"))


def test_training_images_find_themselves(run_folder):
    assert run(run_folder, "--nb_knn", "1", val=TRAIN)["results"]["full"]["1"]["top1"] == 100


def test_an_untrained_encoder_whose_features_are_nearly_alike(tmp_path):
    """LayerScale 1e-5: cosines of different images differ by 1e-8 at most. The oracle computes them in float64."""
    source = "random:vit_tiny/8@32"
    flags = ["--encoder", source, "--num-workers", "0", "--device", "cpu", "--output-dir", str(tmp_path)]

    def top1(*more):
        knn.main([*flags, "--train-dataset", TRAIN, *more])
        return json.loads((tmp_path / "results_eval_knn.json").read_text())["results"]["full"]

    encoder = load_encoder(source)
    parts = []
    for images in read_labelled(TRAIN, [VAL], "test"):
        extractor = FeatureExtractor(encoder, torch.device("cpu"), batch_size=256, num_workers=0)
        parts += [extractor.pooled(images).double().numpy(), images.labels.numpy()]
    train, train_labels, val, val_labels = parts
    assert cosine_distances(train).max() < 1e-6
    found = top1("--val-dataset", VAL, "--nb_knn", "1", "7")
    for k in (1, 7):
        oracle = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
        expected = 100 * oracle.fit(train, train_labels).score(val, val_labels)
        assert found[str(k)]["top1"] == pytest.approx(expected)
    assert top1("--val-dataset", TRAIN, "--nb_knn", "1")["1"]["top1"] == 100


def test_images_per_class_and_tries(run_folder):
    results = run(run_folder, "--n-per-class-list", "2", "-1", "--n-tries", "3", "--nb_knn", "1", "5")["results"]
    assert list(results) == ["2 per class", "full"] and list(results["2 per class"]) == ["1", "2"]


def test_subsets_hold_so_many_images_of_each_class():
    labels = torch.arange(40) % 4
    first, second = knn.draw_subsets(labels, 3, n_tries=2)
    assert labels[first].bincount().tolist() == [3] * 4 and not torch.equal(first, second)
    assert torch.equal(first, knn.draw_subsets(labels, 3, n_tries=1)[0])
    with pytest.raises(ValueError, match="--n-per-class-list 0"):
        knn.draw_subsets(labels, 0, 1)
    with pytest.raises(ValueError, match="--n-per-class-list 11 is more than 4 of the 4 classes have"):
        knn.draw_subsets(labels, 11, 1)


def test_max_images_and_output_dir(run_folder, tmp_path):
    new = tmp_path / "new"
    protocol = run(run_folder, "--max-images", "20", "--output-dir", str(new), results=new)["protocol"]
    assert protocol["num_train_images"] == protocol["num_val_images"] == protocol["max_images"] == 20


def test_unlabelled_data(run_folder, tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(DataError, match="k-NN needs labels"):
        run(run_folder, train=f"Folder:root={tmp_path}")


def test_temperature(run_folder):
    for given, shown in {"0": "0.0", "nan": "nan", "inf": "inf"}.items():
        with pytest.raises(ValueError, match=f"--temperature must be positive, got {shown}"):
            run(run_folder, "--temperature", given)


def test_several_numbers_are_separated_by_spaces(run_folder, capsys):
    with pytest.raises(SystemExit):
        run(run_folder, "--nb_knn", "10,20")
    assert "must be a whole number, got '10,20'; separate several by spaces" in capsys.readouterr().err


def run_in_a_process(argv):
    knn.main(argv)


def test_two_processes_equal_one(run_folder, tmp_path):
    flags = ["--nb_knn", "1", "5", "20", "--n-per-class-list", "-1", "2"]
    one = run(run_folder, *flags, val=VAL.replace("24", "23"))
    common = ["--encoder", str(run_folder), "--num-workers", "0", "--device", "cpu", "--output-dir", str(tmp_path)]
    data = ["--train-dataset", TRAIN, "--val-dataset", VAL.replace("24", "23")]
    run_ranks(run_in_a_process, 2, [*common, *data, *flags])
    two = json.loads((tmp_path / "results_eval_knn.json").read_text())
    assert two["results"] == one["results"] and two["protocol"]["num_val_images"] == 23
    assert two["protocol"]["processes"] == 2


def test_broken_weights(tmp_path, run_folder):
    path = run_folder / "eval" / "training_3" / "teacher_checkpoint.pth"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["teacher"]["backbone.norm.weight"].fill_(torch.nan)
    torch.save(checkpoint, tmp_path / "teacher_checkpoint.pth")
    with pytest.raises(ValueError, match="features of 48 of 48 images are NaN or infinite"):
        run(tmp_path)


def test_classes_that_training_lacks(run_folder):
    with pytest.raises(DataError, match=r"2 of the 10 classes of .* have no image in"):
        run(run_folder, train="Shapes:split=TRAIN:num=8:size=32")


SCRIPTS = Path(__file__).parents[2] / "eval"


def test_runs_as_a_script():
    done = subprocess.run([sys.executable, str(SCRIPTS / "knn.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--pretrained-weights" in done.stdout


@pytest.mark.parametrize("program", ["linear", "logreg", "equivariance"])
def test_the_others_run_as_scripts(program, monkeypatch, capsys):
    """As `python eval/linear.py --help` does, but in this process."""
    script = SCRIPTS / f"{program}.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(SCRIPTS)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0 and "--pretrained-weights" in capsys.readouterr().out
