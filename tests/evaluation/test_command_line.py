import time

import pytest
import torch

from dinov2_eq.distributed import pick_device
from dinov2_eq.evaluation.command_line import (
    accuracy_table,
    add_subset_flags,
    encoder_of,
    evaluation_parser,
    evaluation_processes,
    format_table,
    protocol_of,
)


def test_table():
    assert format_table(["task", "R2"], [["blur", "0.5"], ["rotation", "-0.25"]]).splitlines() == [
        "task         R2",
        "--------  -----",
        "blur        0.5",
        "rotation  -0.25",
    ]


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="torch sees no GPU"):
        pick_device("cuda")


def test_flags_and_their_record(capsys):
    parser = evaluation_parser("program", "What it does.", batch_size=16)
    args = parser.parse_args(["--pretrained-weights", "run", "--val-dataset", "Shapes:split=VAL"])
    record = protocol_of(args, torch.device("cpu"), time.perf_counter())
    assert record["val_dataset"] == "Shapes:split=VAL" and record["batch_size"] == 16 and record["device"] == "cpu"
    assert record["processes"] == 1 and "encoder" not in record
    assert "pretrained_weights" not in record and "output_dir" not in record and "torch" in record["environment"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--pretrained-weights", "run", "--batch-size", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parser.parse_args(["--pretrained-weights", "run", "--num-workers", "-1"])
    assert "must be at least 0, got -1" in capsys.readouterr().err


def test_exactly_one_encoder(capsys):
    parser = evaluation_parser("program", "What it does.", batch_size=16)
    assert encoder_of(parser.parse_args(["--encoder", "timm:vit"])) == "timm:vit"
    assert encoder_of(parser.parse_args(["--pretrained-weights", "run"])) == "run"
    for flags, message in (([], "is required"), (["--encoder", "a", "--pretrained-weights", "b"], "not allowed with")):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
        assert message in capsys.readouterr().err
    several = evaluation_parser("program", "What it does.", batch_size=16, many_encoders=True)
    assert encoder_of(several.parse_args(["--encoder", "a", "b"])) == ["a", "b"]
    assert encoder_of(several.parse_args(["--pretrained-weights", "b"])) == "b"
    assert "(default: None)" not in several.format_help().split("--config-file YAML")[1].split("config of")[0]


def test_a_dry_run_needs_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    parser = evaluation_parser("program", "What it does.", batch_size=16)
    add_subset_flags(parser)
    args = parser.parse_args(["--encoder", "a", "--device", "cuda", "--dry-run"])
    assert args.n_per_class == -1 and args.max_images is None and args.seed == 0
    with evaluation_processes(args) as device:
        assert device.type == "cpu"
    args.dry_run = False
    with pytest.raises(ValueError, match="torch sees no GPU"), evaluation_processes(args):
        pass


def test_accuracy_table():
    found = {
        "mean_accuracy": {"top1": 50.0, "top5": 100.0},
        "mean_per_class_accuracy": {"top1": 40.0, "top5": 90.0},
        "per_class_accuracy": {"top1": [40.0, None]},
    }
    two_classes = {"mean_accuracy": {"top1": 1.0}, "mean_per_class_accuracy": {"top1": 2.0}}
    accuracies = {"a": found, "b": two_classes}
    table = accuracy_table(accuracies, {"a": "per_class_accuracy", "b": "mean_accuracy"})
    assert [line.split() for line in table.splitlines()[2:]] == [
        ["a", "mean_per_class_accuracy", "40.00", "90.00"],
        ["b", "mean_accuracy", "1.00"],
    ]
