import json

import pytest
import torch

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.eval import equivariance
from dinov2_eq.models import build_backbone
from tests.processes import run_ranks

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
    assert results["protocol"]["borders_px"]["32"]["mask_radius"]["rotation"] == 15.5
    assert results["encoder"] == results["encoders"]["trained"] and results["encoders"]["random-init"]["step"] == 0
    assert results["variants"] == {"rows": [], "summary": []} and not (run_folder / "report_card.html").exists()
    output = capsys.readouterr().out
    assert "random-init R2 mean" in output and "mean_masked" in output
    assert output.rstrip().endswith(str(run_folder / "results_eval_equivariance.json"))


def test_one_task_without_random_init_and_with_seeds(run_folder):
    flags = ["--tasks", "translation", "--no-random-init", "--num-seeds", "2", "--max-shift", "0.2", "--tokens", "cls"]
    results = run(run_folder, *flags, "--head", "linear", "--max-train-images", "10")
    assert [row["border"] for row in results["rows"]] == BORDERS["translation"]
    assert results["rows"][0]["r2_pooled_std"] > 0 and results["summary"] == []
    assert results["protocol"]["num_train_images"] == 10 and results["protocol"]["max_shift"] == 0.2


def test_read_outs_of_the_equivariant_half(run_folder, tmp_path):
    content = torch.load(run_folder / "eval/training_3/teacher_checkpoint.pth", weights_only=True)
    content["teacher"] |= {
        "projection.equivariant.weight": torch.randn(6, 192),
        "projection.equivariant.bias": torch.randn(6),
    }
    torch.save(content, tmp_path / "teacher_checkpoint.pth")
    results = run(tmp_path, "--tasks", "blur", "--tokens", "both", "grid2", "equi", "equi_grid2")
    rows = [*results["rows"], *results["variants"]["rows"]]
    kinds = {(row["encoder"], row["tokens"]) for row in rows}
    names, tokens = ("trained", "random-init"), ("both", "grid2", "equi", "equi_grid2")
    assert kinds == {(name, kind) for name in names for kind in tokens}
    assert all(-1 < row["r2_pooled"] < 1 for row in rows)
    with pytest.raises(ValueError, match="trained has no equivariant half"):
        run(run_folder, "--tasks", "blur", "--tokens", "equi")


def test_same_numbers_twice(run_folder):
    first, second = (run(run_folder, "--tasks", "blur", "--no-random-init")["rows"] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--tasks", "rotaton"], "Unknown task 'rotaton'.* Did you mean 'rotation'"),
        (["--tasks", "blur", "--blur-sigma", "2", "1"], "Task blur has an empty range"),
        (["--tasks", "rotation", "--max-angle-deg", "0"], "Task rotation has an empty range, .* see the ranges"),
        (["--max-shift", "0.6"], r"translation: shifts up to 0\.6"),
        (["--tasks", "crop", "--min-crop-share", "1"], "Task crop has an empty range"),
    ],
)
def test_mistakes(run_folder, flags, text):
    with pytest.raises(ValueError, match=text):
        run(run_folder, *flags)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--max-angle-deg", "400"], r"--max-angle-deg: must lie in [0, 180], got 400"),
        (["--max-angle-deg", "nan"], r"--max-angle-deg: must lie in [0, 180], got nan"),
        (["--max-hue", "2"], "--max-hue: must lie in [0, 0."),
        (["--max-color", "5"], "--max-color: must lie in [0, 1], got 5"),
        (["--blur-sigma", "-2", "1"], "--blur-sigma: must lie in [0, inf), got -2"),
    ],
)
def test_ranges_are_those_of_training(run_folder, capsys, flags, text):
    with pytest.raises(SystemExit):
        run(run_folder, *flags)
    assert text in capsys.readouterr().err


def test_wrong_data_is_found_before_any_work(run_folder, monkeypatch):
    monkeypatch.setattr(equivariance, "load_encoder", None)
    with pytest.raises(ValueError, match="unknown dataset 'Nope'"):
        run(run_folder, "--val-dataset", "Nope")


CARD = ["--card", "--num-seeds", "2", "--tasks", "rotation", "translation", "color_jitter", "blur", "flip"]
SMALL = ["--hidden-dim", "8", "--epochs", "1", "--num-workers", "0", "--device", "cpu"]
TRAIN, VAL = "Shapes:split=TRAIN:num=24:size=32", "Shapes:split=VAL:num=14:size=32"


def card(output, sources, *flags, train=TRAIN, val=VAL):
    data = ["--train-dataset", train, "--val-dataset", val, "--output-dir", str(output)]
    equivariance.main(["--encoder", *sources, *data, *SMALL, *flags])
    return json.loads((output / "results_eval_equivariance.json").read_text())


def check_schema(results, encoders):
    """What the page and other readers rely on."""
    heads, tokens, seeds = (results["protocol"][name] for name in ("head", "tokens", "num_seeds"))
    assert list(results["encoders"]) == encoders
    everything = [*results["rows"], *results["variants"]["rows"]]
    kinds = {(row["encoder"], row["tokens"], row["head"]) for row in everything}
    assert kinds == {(encoder, kind, head) for encoder in encoders for kind in tokens for head in heads}
    assert {(row["tokens"], row["head"]) for row in results["rows"]} == {(tokens[0], heads[0])}
    settings = {(row["task"], row["border"]) for row in results["rows"]}
    assert len(everything) == len(kinds) * len(settings) and len(results["rows"]) == len(encoders) * len(settings)
    for row in everything:
        assert {"r2_pooled", "r2_mean", "r2_components", "r2_pooled_std", "r2_pooled_by_seed"} <= row.keys()
        assert len(row["r2_pooled_by_seed"]) == seeds
    means = [*results["summary"], *results["variants"]["summary"]]
    assert len(means) == 3 * len(kinds) and all(mean["r2_pooled_std"] >= 0 for mean in means)
    assert len(results["cosines"]) == len(encoders) * len(settings) * len(tokens)
    for row in results["cosines"]:
        assert -1 <= row["cosine_of_others"] <= 1.001 and -1 <= row["cosine"] <= 1.001
    assert results["angles"]["angles_deg"] == list(range(0, 360, 15))
    assert len(results["angles"]["curves"]) == len(encoders) * len(tokens)
    for curve in results["angles"]["curves"]:
        assert len(curve["recall_at_1"]) == 24 and all(0 <= share <= 1 for share in curve["recall_at_1"])


def test_card_of_a_run_and_of_an_encoder_of_another_size(run_folder, tmp_path, capsys):
    sources = [str(run_folder), "random:vit_tiny/16@48"]
    results = card(tmp_path, sources, *CARD, "--tokens", "both", "mean", "--max-train-images", "20")
    check_schema(results, [run_folder.name, "random:vit_tiny/16@48", "random-init"])
    assert set(results["protocol"]["borders_px"]) == {"32", "48"} and results["protocol"]["notices"] == []
    angles = results["angles"]
    assert angles["k"] == 20 and angles["recall_at_1_by_chance"] == 1 / 14 and angles["knn_top1_by_chance"] == 10
    for curve in angles["curves"]:
        assert len(curve["knn_top1"]) == 24
        if curve["tokens"] == "mean":
            assert curve["recall_at_1"][0] == 1
    assert capsys.readouterr().out.rstrip().endswith(str(tmp_path / "report_card.html"))
    assert "random:vit_tiny/16@48" in (tmp_path / "report_card.html").read_text()


def test_card_of_data_without_labels(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shapes = build_dataset(TRAIN)
    for index in range(12):
        shapes.read(index).save(images / f"{index}.png")
    data = f"Folder:root={images}"
    results = card(tmp_path, ["random:vit_tiny/16@32"], *CARD[:3], "--tasks", "blur", train=data, val=data)
    assert results["protocol"]["head"] == ["mlp", "linear"]
    assert results["protocol"]["tokens"] == ["both", "cls", "mean", "grid2"]
    assert all("knn_top1" not in curve for curve in results["angles"]["curves"])
    (notice,) = results["protocol"]["notices"]
    assert notice.startswith("There is no k-NN over the angle: k-NN over the angle needs labels")
    assert list(results["encoders"]) == ["random-init"] and results["summary"] == []
    assert "needs labels" in (tmp_path / "report_card.html").read_text()


def test_what_the_card_cannot_show(run_folder, tmp_path):
    with pytest.raises(ValueError, match="--output-dir is missing: the results of several"):
        equivariance.main(["--encoder", str(run_folder), "random:vit_tiny/16@32", "--train-dataset", TRAIN])
    with pytest.raises(ValueError, match="given twice"):
        card(tmp_path, [str(run_folder)] * 2)
    many = [f"random:vit_tiny/{patch}@{size}" for patch in (8, 16) for size in (16, 32, 48, 64)]
    with pytest.raises(ValueError, match=rf"got 10 .*{run_folder.name}, random:vit_tiny/8@16, .*, random-init"):
        card(tmp_path, [str(run_folder), *many], "--card")
    with pytest.raises(ValueError, match="unknown dataset 'Nope'"):
        card(tmp_path, ["random:vit_tiny/16@32"], "--card", train="Nope")


def card_on_rank(output):
    output.mkdir(exist_ok=True)
    card(
        output, ["random:vit_tiny/16@32"], *CARD[:3], "--tasks", "rotation", "flip", "--tokens", "mean", "--draws", "2"
    )


def test_two_processes_find_what_one_does(tmp_path):
    card_on_rank(tmp_path / "one")
    run_ranks(card_on_rank, 2, tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "results_eval_equivariance.json").read_text()) for name in ("one", "two"))
    assert two["protocol"]["processes"] == 2
    for key in ("encoders", "rows", "variants", "cosines", "angles"):
        assert numbers_of(two[key]) == pytest.approx(numbers_of(one[key]), abs=1e-3), key
    assert (tmp_path / "two" / "report_card.html").is_file()


def numbers_of(value):
    if isinstance(value, dict | list):
        return [
            number for entry in (value.values() if isinstance(value, dict) else value) for number in numbers_of(entry)
        ]
    return [value] if isinstance(value, float) else []
