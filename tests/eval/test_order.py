import json

import pytest
import torch
from scipy.stats import spearmanr

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.eval import order
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.evaluation.probe_transforms import ordered_transform
from dinov2_eq.evaluation.summary import read_numbers
from dinov2_eq.evaluation.transformed_pairs import SizedImages, draw_theta
from dinov2_eq.probes.features import pooled_features
from tests.helpers import in_this_process
from tests.processes import run_ranks

ENCODER, DATA = "random:vit_tiny/16@32", "Shapes:split=VAL:num=12:size=32"
RANGES = {"max_angle_deg": 45.0, "max_color": 0.4, "max_hue": 0.1, "blur_sigma_min_max": [0.1, 2.0]}
CPU = ["--num-workers", "0", "--device", "cpu"]


def run(folder, *flags):
    order.main(["--encoder", ENCODER, "--val-dataset", DATA, "--output-dir", str(folder), *CPU, *flags])
    return json.loads((folder / "results_eval_order.json").read_text())


def test_against_a_loop_over_images_and_strengths(tmp_path, capsys):
    found = run(tmp_path, "--tasks", "color_jitter", "blur", "--max-val-images", "5")
    encoder, dataset = load_encoder(ENCODER), build_dataset(DATA)
    indices = fixed_subset(len(dataset), 5)
    images = [SizedImages(dataset, 32, [32])[int(index)][32][None] / 255 for index in indices]

    def feature(image):
        return pooled_features(encoder.backbone, image, mean=encoder.mean, std=encoder.std)[0].double()

    bases = [feature(image) for image in images]
    transform = ordered_transform("", "color_jitter", RANGES)
    accuracies, correlations, last = [], [], []
    for image, base, theta in zip(images, bases, draw_theta("color_jitter", transform, 5, 1, "order")[0], strict=True):
        ends = theta / (theta.abs() / torch.tensor([0.4, 0.4, 0.4, 0.1])).max()
        distances = []
        for tenth in range(1, 11):
            moved = feature(transform.apply(image, ends[None] * tenth / 10, (32, 32)))
            distances.append(1 - torch.cosine_similarity(base, moved, dim=0).item())
        pairs = [(a, b) for place, a in enumerate(distances) for b in distances[place + 1 :]]
        accuracies.append(sum(a < b for a, b in pairs) / len(pairs))
        correlations.append(spearmanr(range(10), distances).statistic)
        last.append(distances[-1])
    scores = found["results"]["color_jitter"]["none"]
    assert scores["order_accuracy"] == pytest.approx(sum(accuracies) / 5, abs=0.01)
    assert scores["spearman"] == pytest.approx(sum(correlations) / 5, abs=0.01)
    assert scores["distances"][-1] == pytest.approx(sum(last) / 5, rel=1e-3)
    others = [1 - torch.cosine_similarity(a, b, dim=0).item() for a in bases for b in bases if a is not b]
    assert scores["relative_distance"] == pytest.approx(scores["distances"][-1] / (sum(others) / 20), rel=1e-3)

    assert list(found["results"]) == ["color_jitter", "blur"] and not found["comparisons"]  # it is untrained already
    assert found["protocol"]["num_val_images"] == 5 and len(found["protocol"]["strengths"]) == 10
    assert found["protocol"]["source"] == "our reading of Xie et al. 2022"
    assert read_numbers(tmp_path)["color_jitter none order_accuracy"] == scores["order_accuracy"]
    assert "random-init Spearman" in capsys.readouterr().out


def test_a_trained_encoder_has_an_untrained_row_and_every_border(tmp_path):
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path / "run"), "optim.steps=1"]
    lengths = ["optim.warmup_steps=0", "optim.freeze_last_layer_steps=0", "teacher.warmup_teacher_temp_steps=0"]
    assert in_this_process([*words, *lengths]) == 0
    words = ["eval", "order", "--encoder", str(tmp_path / "run"), "--val-dataset", DATA, "--tasks", "se2", *CPU]
    assert in_this_process([*words, "--output-dir", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "results_eval_order.json").read_text())
    assert list(found["comparisons"]) == ["random-init"]
    for scores in (found["results"], found["comparisons"]["random-init"]):
        assert list(scores["se2"]) == ["zeros", "masked", "canvas"]
        assert all(0 <= score["order_accuracy"] <= 1 for score in scores["se2"].values())


def test_features_that_are_all_alike_are_at_chance():
    scores = order.scores_of(torch.zeros(10, 4), others=0.0)
    del scores["distances"]
    assert scores == {"order_accuracy": 0.5, "spearman": 0, "spearman_across": 0, "relative_distance": 0}


@pytest.mark.parametrize("task", ["rotation", "blur", "one_of_all"])
def test_strengths_go_to_the_end_of_the_range_in_one_direction(task):
    transform = ordered_transform("", task, RANGES)
    theta = order.strengths_of(task, transform, 50)
    for strength, rows in zip(order.STRENGTHS, theta, strict=True):
        torch.testing.assert_close(transform.strength(rows), torch.full((50,), strength))
        torch.testing.assert_close(rows, strength * theta[-1])
    assert task == "blur" or (theta.min() < 0 < theta.max())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "flip"], "--tasks flip: a flip has no strength to order"),
        (["--tasks", "rotaton"], "--tasks: transform='rotaton' is unknown.*Did you mean 'rotation'"),
        (["--max-angle-deg", "0"], "--tasks rotation: the range of angle_deg is 0"),
        (["--max-val-images", "1"], "at least 2 images, got 1"),
        (["--val-dataset", "Nope"], "unknown dataset 'Nope'"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path, *flags)


def on_rank(folder):
    folder.mkdir(exist_ok=True)
    run(folder, "--tasks", "color_jitter")


def test_two_processes_find_what_one_does(tmp_path):
    on_rank(tmp_path / "one")
    run_ranks(on_rank, 2, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results_eval_order.json").read_text()) for name in ("one", "two"))
    assert two["protocol"]["processes"] == 2
    for key, value in one["results"]["color_jitter"]["none"].items():
        assert two["results"]["color_jitter"]["none"][key] == pytest.approx(value, rel=1e-2), key
