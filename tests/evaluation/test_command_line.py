import time

import pytest
import torch

from dinov2_eq.distributed import pick_device
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, protocol_of


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
    assert "pretrained_weights" not in record and "output_dir" not in record and "torch" in record["environment"]
    with pytest.raises(SystemExit):
        parser.parse_args(["--pretrained-weights", "run", "--batch-size", "0"])
    assert "must be at least 1, got 0" in capsys.readouterr().err
