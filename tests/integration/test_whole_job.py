"""The workflow of a new user on a small scale: two runs, both probes, one page in a browser."""

import json
from pathlib import Path

import pytest
from PIL import Image

from dinov2_eq.config.load import load_config
from dinov2_eq.run.cli import main
from tests.browser import needs_browser, opened, require_sound
from tools import gradient_shares, profile_step, show_views

DATA = ["--train-dataset", "Shapes:split=TRAIN:num=60:size=40", "--val-dataset", "Shapes:split=VAL:num=30:size=40"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("job")
    for name, weight in {"task": 1.0, "control": 0.0}.items():
        run = str(folder / name)
        assert main(["train", "--config-file", "debug", "--output-dir", run, f"equivariance.loss_weight={weight}"]) == 0
        assert (
            main(["eval", "knn", "--pretrained-weights", run, *DATA, "--num-workers", "0", "--nb_knn", "5", "20"]) == 0
        )
        probe = ["--num-workers", "0", "--hidden-dim", "16", "--epochs", "2"]
        assert main(["eval", "equivariance", "--pretrained-weights", run, *DATA, *probe]) == 0
    assert main(["report", str(folder / "task"), str(folder / "control"), "--output", str(folder / "report.html")]) == 0
    return folder


def test_results_are_json_with_their_protocol(runs):
    for name in ("task", "control"):
        knn = json.loads((runs / name / "results_eval_knn.json").read_text())
        assert set(knn["results"]["full"]) == {"5", "20"} and knn["encoder"]["step"] == 10
        equivariance = json.loads((runs / name / "results_eval_equivariance.json").read_text())
        found = {(row["encoder"], row["task"], row["border"]) for row in equivariance["rows"]}
        for encoder in ("trained", "random-init"):
            for task in ("rotation", "translation"):
                assert {(encoder, task, border) for border in ("zeros", "masked", "canvas")} <= found
            for task in ("color_jitter", "blur"):
                assert {(encoder, task, border) for border in ("none", "masked")} <= found


@needs_browser
def test_the_report_opens_in_a_browser(runs, tmp_path):
    page = runs / "report.html"
    with opened(page, tmp_path / "profile") as browser:
        assert require_sound(browser, page) > 20
        text = browser.execute_script("return document.body.innerText")
    for words in ("reconstruction", "k-NN", "rotation"):
        assert words.lower() in text.lower()


def test_picture_of_the_task(runs, tmp_path):
    show_views.main([str(runs / "task"), "--output", str(tmp_path / "views.png")])
    assert min(Image.open(tmp_path / "views.png").size) > 100


def test_gradient_shares(runs, capsys):
    gradient_shares.main([str(runs / "task"), "--batches", "1"])
    shares = json.loads(capsys.readouterr().out)
    assert shares["step"] == 10 and all(norm > 0 for norm in shares["gradient_norm"].values())
    assert set(shares["gradient_norm"]) == {"dino", "koleo", "ibot", "reconstruction"}
    depth = load_config(str(runs / "task" / "config.yaml")).student.depth
    for cosines in shares["cosine_with_others"].values():
        assert len(cosines) == depth + 2 and all(0 < abs(cosine) < 1 for cosine in cosines.values())


def test_cost_of_the_task(capsys):
    profile_step.main(["--config-file", "debug", "--steps", "1"])
    result = json.loads(capsys.readouterr().out)
    assert set(result["images_per_second"]) == {"disabled", "control", "task"}
