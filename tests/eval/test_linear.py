import json
import signal

import pytest
import torch

from dinov2_eq.data.datasets import DataError
from dinov2_eq.distributed.signals import StoppedBySignal
from dinov2_eq.eval import linear
from dinov2_eq.evaluation import linear_training
from dinov2_eq.models import build_backbone
from tests.processes import run_ranks

CHECKPOINT = "running_checkpoint_linear_eval.pth"
SMALL = ["--encoder", "random:vit_tiny/16@32", "--num-workers", "0", "--device", "cpu"]
SHORT = ["--epochs", "3", "--epoch-length", "4", "--eval-period-iterations", "6", "--batch-size", "8"]


def run(folder, colours, *flags):
    data = ["--train-dataset", colours["train"], "--val-dataset", colours["val"]]
    linear.main([*SMALL, *SHORT, *data, "--output-dir", str(folder), *flags])
    return json.loads((folder / "results_eval_linear.json").read_text())


def heads_of(folder):
    return torch.load(folder / CHECKPOINT, weights_only=True)["training"]["heads"]


def without_protocol(results):
    return {name: value for name, value in results.items() if name != "protocol"}


def test_separable_images_all_heads_and_what_the_file_says(colours, tmp_path, capsys):
    results = run(tmp_path, colours, "--learning-rates", "0.1", "1", "--test-datasets", colours["train"])
    assert list(results["results"]["accuracy"]) == [colours["val"], colours["train"]]
    for found in results["results"]["accuracy"].values():
        assert found["mean_accuracy"]["top1"] == found["mean_per_class_accuracy"]["top1"] == 100
    assert len(results["heads"]) == 8 and len({head["name"] for head in results["heads"]}) == 8
    assert set(results["heads"][0]) == {"name", "num_blocks", "avgpool", "learning_rate", "top1"}
    assert set(results["heads"][0]["top1"]) == {"selection", colours["val"], colours["train"]}
    assert results["results"]["head"] in [head["name"] for head in results["heads"]]
    assert [score["iteration"] for score in results["history"]] == [6, 12]
    protocol = results["protocol"]
    assert protocol["num_train_images"] == 44 and protocol["num_selection_images"] == 4  # 1 of 12 of each class
    assert protocol["num_images"][colours["val"]] == 22 and protocol["num_classes"] == 4
    assert protocol["global_batch_size"] == 8 and protocol["iterations"] == 12 and protocol["epochs"] == 3
    assert "10% of the training images, held out" in protocol["selection"]
    output = capsys.readouterr().out
    assert "the images below chose nothing" in output and "100.00" in output
    assert output.rstrip().endswith(str(tmp_path / "results_eval_linear.json"))


def test_the_whole_grid_and_dinov2s_selection(colours, tmp_path, capsys):
    results = run(tmp_path, colours, "--select-on-val", "--val-metric-type", "per_class_accuracy")
    assert len(results["heads"]) == 52
    by_class = results["results"]["accuracy"][colours["val"]]["per_class_accuracy"]["top1"]
    best = max(head["top1"][colours["val"]] for head in results["heads"])
    assert sum(by_class) / 4 == pytest.approx(best) and all(
        head["top1"]["selection"] == head["top1"][colours["val"]] for head in results["heads"]
    )
    assert results["protocol"]["num_train_images"] == 48 and results["protocol"]["num_selection_images"] == 22
    assert "as DINOv2 does" in results["protocol"]["selection"] and "optimistic" in capsys.readouterr().out


def stop_after_step_7(folder, colours, monkeypatch):
    update = linear_training.GridTraining.update

    def interrupted(training, features, labels):
        update(training, features, labels)
        if training.step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(linear_training.GridTraining, "update", interrupted)
        with pytest.raises(StoppedBySignal, match="stopped by SIGTERM after step 7, saved"):
            run(folder, colours)


def test_a_stop_changes_nothing(colours, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", colours)
    stop_after_step_7(tmp_path / "stopped", colours, monkeypatch)
    capsys.readouterr()
    resumed = run(tmp_path / "stopped", colours)
    assert "going on after step 7 of 12" in capsys.readouterr().err
    assert without_protocol(resumed) == without_protocol(whole)
    for name, tensor in heads_of(tmp_path / "whole").items():
        assert torch.equal(tensor, heads_of(tmp_path / "stopped")[name])
    # A finished one is scored again without training.
    monkeypatch.setattr(linear_training.GridTraining, "update", None)
    again = run(tmp_path / "stopped", colours, "--test-datasets", colours["train"])
    assert again["history"] == whole["history"]
    assert list(again["results"]["accuracy"]) == [colours["val"], colours["train"]]


def test_the_checkpoint_of_another_evaluation(colours, tmp_path, monkeypatch, capsys):
    stop_after_step_7(tmp_path, colours, monkeypatch)
    for flags, message in (
        (["--batch-size", "4"], r"--batch-size times processes was 8 and is now 4"),
        (["--seed", "1"], r"--seed was 0 and is now 1"),
        (["--learning-rates", "0.1"], "the list of heads was"),
        (["--encoder", "random:vit_tiny/8@32"], "the encoder was"),
    ):
        with pytest.raises(ValueError, match=rf"{CHECKPOINT} belongs to another .*: {message}.*--no-resume"):
            run(tmp_path, colours, *flags)
    assert run(tmp_path, colours, "--seed", "1", "--no-resume")["protocol"]["seed"] == 1
    capsys.readouterr()
    # Nothing is lost where that one was finished.
    assert run(tmp_path, colours, "--seed", "2")["protocol"]["seed"] == 2
    assert "finished evaluation with other settings and will be replaced: --seed was 1" in capsys.readouterr().err


def test_other_weights_at_the_same_path(colours, tmp_path, capsys):
    path, results = tmp_path / "weights.pth", []
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save(build_backbone("vit_tiny", patch_size=16, img_size=32, depth=4).state_dict(), path)
        results.append(run(tmp_path / "out", colours, "--encoder", str(path))["heads"])
    assert "will be replaced: the encoder's weights was" in capsys.readouterr().err
    assert results[1] == run(tmp_path / "fresh", colours, "--encoder", str(path))["heads"] != results[0]


def test_kept_checkpoints(colours, tmp_path):
    run(tmp_path, colours, "--save-checkpoint-frequency", "2")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint_linear_eval_8.pth", "results_eval_linear.json", CHECKPOINT]


def test_few_images(colours, tmp_path):
    protocol = run(tmp_path, colours, "--n-per-class", "5")["protocol"]
    assert protocol["num_train_images"] == 16 and protocol["num_selection_images"] == 4
    with pytest.raises(ValueError, match="--n-per-class 13 is more than 4 of the 4 classes have"):
        run(tmp_path, colours, "--n-per-class", "13")
    with pytest.raises(ValueError, match="a single training image"):
        run(tmp_path, colours, "--n-per-class", "1")


def run_in_a_process(argv):
    linear.main(argv)


def test_two_processes_equal_one(colours, tmp_path):
    one = run(tmp_path / "one", colours)
    data = ["--train-dataset", colours["train"], "--val-dataset", colours["val"], "--output-dir", str(tmp_path / "two")]
    run_ranks(run_in_a_process, 2, [*SMALL, *SHORT, *data, "--batch-size", "4"])
    two = json.loads((tmp_path / "two" / "results_eval_linear.json").read_text())
    assert without_protocol(two) == without_protocol(one) and two["protocol"]["processes"] == 2
    for name, tensor in heads_of(tmp_path / "one").items():
        torch.testing.assert_close(heads_of(tmp_path / "two")[name], tensor, rtol=0, atol=1e-5)


def test_mistakes(colours, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"--n-last-blocks 20 does not fit this encoder: .*12 blocks"):
        run(tmp_path, colours, "--n-last-blocks", "1", "20", "--dry-run")
    with pytest.raises(DataError, match="Linear classification needs labels"):
        run(tmp_path, {**colours, "val": colours["val"].replace("ImageFolder", "Folder")})
    with pytest.raises(ValueError, match="All heads diverged"):
        run(tmp_path, colours, "--learning-rates", "1e38")
    with pytest.raises(SystemExit):
        run(tmp_path, colours, "--learning-rates", "-1")
    assert "must be positive, got -1.0" in capsys.readouterr().err


def test_a_dry_run_leaves_nothing(colours, tmp_path):
    data = ["--train-dataset", colours["train"], "--val-dataset", colours["val"]]
    linear.main([*SMALL, *data, "--output-dir", str(tmp_path / "new"), "--dry-run"])
    assert not (tmp_path / "new").exists()
