import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2_eq.data.datasets import DataError
from dinov2_eq.distributed.signals import StoppedBySignal
from dinov2_eq.eval import linear
from dinov2_eq.evaluation import linear_training
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.models import build_backbone
from dinov2_eq.probes.features import block_features
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


def stop_after_step_7(folder, colours, monkeypatch, *flags):
    update = linear_training.GridTraining.update

    def interrupted(training, features, labels):
        update(training, features, labels)
        if training.step == 7:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patched:
        patched.setattr(linear_training.GridTraining, "update", interrupted)
        with pytest.raises(StoppedBySignal, match="stopped by SIGTERM after step 7, saved"):
            run(folder, colours, *flags)


def test_a_stop_changes_nothing(colours, tmp_path, monkeypatch, capsys):
    whole = run(tmp_path / "whole", colours)
    stop_after_step_7(tmp_path / "stopped", colours, monkeypatch)
    # Where a job is submitted, one process makes a dry run for the many of the job, which may be as many as before.
    submitted = ["--train-dataset", colours["train"], "--val-dataset", colours["val"], "--dry-run"]
    linear.main([*SMALL, *SHORT, *submitted, "--output-dir", str(tmp_path / "stopped"), "--batch-size", "2"])
    capsys.readouterr()
    resumed = run(tmp_path / "stopped", colours)
    assert "resuming after step 7 of 12" in capsys.readouterr().err
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
        (["--encoder", "random:vit_tiny/8@32"], "the encoder's parameters was 5492352 and is now 5384064"),
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


@pytest.fixture
def renamed(tmp_path, colours):
    """Two of the reported classes in another order, and the mapping to those of training."""
    val = Path(colours["val"].removeprefix("ImageFolder:root="))
    for number, name in enumerate(("red", "green")):
        shutil.copytree(val / name, tmp_path / "two" / f"{number}_{name}")
    np.save(tmp_path / "two.npy", np.array([3, 1]))  # of blue, green, grey, red
    return f"ImageFolder:root={tmp_path / 'two'}", str(tmp_path / "two.npy")


def right_of_two(root, heads):
    """For each of the two heads of one block: which of `renamed`'s images get 1; and their labels. One by one."""
    encoder = load_encoder("random:vit_tiny/16@32", None)
    right, labels = [], []
    for label, folder in enumerate(("0_red", "1_green")):
        for path in sorted((root / folder).iterdir()):
            pixels = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)[None] / 255
            (tokens,) = block_features(encoder.backbone, pixels, mean=encoder.mean, std=encoder.std, num_blocks=1)
            answers = []
            for number in range(2):  # class token; and with the mean patch token
                weight, bias = heads[f"weights.{number}"][0], heads[f"biases.{number}"][0]
                scores = weight @ tokens[: weight.shape[1]] + bias
                answers.append(0 if scores[3] > scores[1] else 1)
            right.append([float(answer == label) for answer in answers])
            labels.append(label)
    return torch.tensor(right).T, torch.tensor(labels)


def test_class_mappings_and_metrics(colours, tmp_path, renamed, capsys):
    data, mapping = renamed
    # With one short step the heads are bad at four classes.
    flags = ["--epochs", "1", "--epoch-length", "1", "--learning-rates", "1e-5", "--n-last-blocks", "1"]
    tests = ["--test-datasets", data, colours["val"], "--test-class-mapping-fpaths", mapping, "None"]
    metrics = ["--test-metric-types", "per_class_accuracy", "mean_per_class_accuracy"]
    results = run(tmp_path / "out", colours, *flags, *tests, *metrics)
    name = f"{data}, classes of {mapping}"
    assert results["protocol"]["metrics"] == {colours["val"]: "mean_accuracy", name: "per_class_accuracy"}
    assert list(results["results"]["accuracy"]) == [colours["val"], name]
    assert results["protocol"]["num_choices"] == {colours["val"]: 4, name: 2}
    assert results["protocol"]["num_images"] == {colours["val"]: 22, name: 11}

    right, labels = right_of_two(tmp_path / "two", heads_of(tmp_path / "out"))
    by_class = [[100 * found[labels == label].mean().item() for label in (0, 1)] for found in right]
    assert [head["top1"][name] for head in results["heads"]] == pytest.approx([sum(each) / 2 for each in by_class])
    found = results["results"]["accuracy"][name]
    best = [head["name"] for head in results["heads"]].index(results["results"]["head"])
    assert found["per_class_accuracy"]["top1"] == pytest.approx(by_class[best])
    assert set(found["mean_accuracy"]) == {"top1"}  # five answers of two would always be right
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [row[-2] for row in rows if row and row[0] == data + ","] == ["mean_per_class_accuracy"]

    # Other mappings of the same images, read once.
    other = tmp_path / "other" / "two.npy"
    other.parent.mkdir()
    np.save(other, np.array([0, 2]))
    capsys.readouterr()
    both = ["--test-datasets", data, data, "--test-class-mapping-fpaths", mapping, str(other)]
    twice = run(tmp_path / "out", colours, *flags, *both)
    assert list(twice["results"]["accuracy"])[1:] == [name, f"{data}, classes of {other}"]
    assert twice["heads"][0]["top1"][name] == pytest.approx(100 * right[0].mean().item())
    assert capsys.readouterr().err.count(f"{data}: features of 11 images") == 1

    # The validation set takes one too, and chooses among its classes.
    own = ["--val-class-mapping-fpath", mapping, "--select-on-val"]
    chosen = run(tmp_path / "val", {**colours, "val": data}, *flags, *own)
    right, _ = right_of_two(tmp_path / "two", heads_of(tmp_path / "val"))
    expected = [100 * found.mean().item() for found in right]
    assert [head["top1"]["selection"] for head in chosen["heads"]] == pytest.approx(expected)


def test_scores_on_the_way_are_by_one_mapping(colours, tmp_path, renamed, monkeypatch):
    data, mapping = renamed
    flags = ["--select-on-val", "--val-class-mapping-fpath", mapping]
    stop_after_step_7(tmp_path, {**colours, "val": data}, monkeypatch, *flags)
    np.save(mapping, np.array([1, 3]))
    with pytest.raises(ValueError, match=r"what is in --val-class-mapping-fpath was \[3, 1\] and is now \[1, 3\]"):
        run(tmp_path, {**colours, "val": data}, *flags)


def test_flags_for_each_test_set(colours, tmp_path, renamed):
    data, mapping = renamed
    for flags, message in (
        (["--test-datasets", data, data, "--test-class-mapping-fpaths", mapping], "there are 2 of them, and 1 values"),
        (["--test-metric-types", "mean_accuracy"], "--test-metric-types needs .* there are 0 of them, and 1 values"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, colours, *flags)
    with pytest.raises(DataError, match=r"Label 0 is 'blue' in .* and '0_red' in"):
        run(tmp_path, colours, "--test-datasets", data)


def test_heads_that_were_trained_before(colours, tmp_path, monkeypatch, capsys):
    trained = run(tmp_path / "trained", colours, "--save-checkpoint-frequency", "2")
    checkpoint = tmp_path / "trained" / CHECKPOINT
    before = checkpoint.read_bytes()
    monkeypatch.setattr(linear_training.GridTraining, "update", None)
    # By any schedule, on other images, and into the same folder.
    other = {"train": colours["train"], "val": colours["train"]}
    flags = ["--classifier-fpath", str(checkpoint), "--batch-size", "16", "--epochs", "7"]
    again = run(tmp_path / "trained", other, *flags, "--test-datasets", colours["val"])
    assert again["history"] == trained["history"] and again["results"]["head"] == trained["results"]["head"]
    assert (
        again["results"]["accuracy"][colours["val"]] == trained["results"]["accuracy"][colours["val"]]
        and colours["train"] in again["results"]["accuracy"]
    )
    protocol = again["protocol"]
    assert (protocol["iterations"], protocol["global_batch_size"], protocol["epochs"]) == (12, 8, None)
    assert protocol["heads"] == f"of {CHECKPOINT}, trained before" and trained["protocol"]["heads"] == "trained here"
    assert checkpoint.read_bytes() == before
    # And as they were on the way.
    kept = tmp_path / "trained" / "checkpoint_linear_eval_8.pth"
    halfway = run(tmp_path / "halfway", colours, "--classifier-fpath", str(kept))
    assert halfway["protocol"]["iterations"] == 8 and [score["iteration"] for score in halfway["history"]] == [6]
    assert "checkpoint_linear_eval_8.pth, after step 8 of 12" in capsys.readouterr().err
    assert halfway["protocol"]["notices"] == ["the heads are those of step 8 of 12: their training is not finished"]
    assert again["protocol"]["notices"] == []
    assert [path.name for path in (tmp_path / "halfway").iterdir()] == ["results_eval_linear.json"]


def test_heads_that_cannot_be_used(colours, tmp_path):
    run(tmp_path, colours)
    path = tmp_path / CHECKPOINT
    for flags, message in (
        (["--seed", "1"], "--seed was 0 and is now 1"),
        (["--learning-rates", "0.1"], "the list of heads was"),
        (["--encoder", "random:vit_tiny/8@32"], "the encoder's parameters was 5492352 and is now 5384064"),
    ):
        with pytest.raises(ValueError, match=rf"The heads in .*{CHECKPOINT} belong to another evaluation: {message}"):
            run(tmp_path, colours, "--classifier-fpath", str(path), *flags)
    with pytest.raises(FileNotFoundError, match=r"heads.pth"):
        run(tmp_path, colours, "--classifier-fpath", str(tmp_path / "heads.pth"), "--dry-run")
    torch.save({"model": {}, "iteration": 12499}, tmp_path / "heads.pth")  # as DINOv2 writes them
    with pytest.raises(ValueError, match=rf"heads.pth is not a {CHECKPOINT} or .* of this version"):
        run(tmp_path, colours, "--classifier-fpath", str(tmp_path / "heads.pth"))
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{CHECKPOINT} is not a file of weights, or it was cut off"):
        run(tmp_path, colours, "--classifier-fpath", str(path))
    with pytest.raises(ValueError, match=r"is not a file of weights, or it was cut off.*--no-resume to start over"):
        run(tmp_path, colours)


def test_few_images(colours, tmp_path):
    protocol = run(tmp_path, colours, "--n-per-class", "5")["protocol"]
    assert protocol["num_train_images"] == 16 and protocol["num_selection_images"] == 4
    with pytest.raises(ValueError, match="--n-per-class 13 is more than 4 of the 4 classes have"):
        run(tmp_path, colours, "--n-per-class", "13")
    with pytest.raises(ValueError, match="a single training image"):
        run(tmp_path, colours, "--n-per-class", "1")


def run_in_a_process(argv):
    linear.main(argv)


def test_two_processes_equal_one(colours, tmp_path, renamed):
    mapped = ["--test-datasets", renamed[0], "--test-class-mapping-fpaths", renamed[1]]
    one = run(tmp_path / "one", colours, *mapped)
    data = ["--train-dataset", colours["train"], "--val-dataset", colours["val"], "--output-dir", str(tmp_path / "two")]
    run_ranks(run_in_a_process, 2, [*SMALL, *SHORT, *data, *mapped, "--batch-size", "4"])
    two = json.loads((tmp_path / "two" / "results_eval_linear.json").read_text())
    assert without_protocol(two) == without_protocol(one) and two["protocol"]["processes"] == 2
    for name, tensor in heads_of(tmp_path / "one").items():
        torch.testing.assert_close(heads_of(tmp_path / "two")[name], tensor, rtol=0, atol=1e-5)
    checkpoint = ["--classifier-fpath", str(tmp_path / "two" / CHECKPOINT)]
    run_ranks(run_in_a_process, 2, [*SMALL, *data, *mapped, *checkpoint])
    again = json.loads((tmp_path / "two" / "results_eval_linear.json").read_text())
    assert again["results"] == two["results"] and again["protocol"]["iterations"] == 12


def test_the_same_encoder_elsewhere(colours, tmp_path):
    path = tmp_path / "here" / "weights.pth"
    path.parent.mkdir()
    torch.save(build_backbone("vit_tiny", patch_size=16, img_size=32, depth=4).state_dict(), path)
    first = run(tmp_path / "out", colours, "--encoder", str(path))
    path.parent.rename(tmp_path / "there")
    encoder = ["--encoder", str(tmp_path / "there" / "weights.pth")]
    again = run(tmp_path / "new", colours, *encoder, "--classifier-fpath", str(tmp_path / "out" / CHECKPOINT))
    assert again["heads"] == first["heads"]


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
