"""The record of what recipes train is that of their runs, and the same twice."""

import json

from dinov2_eq.tools import trajectories


def test_two_records_are_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(trajectories, "STEPS", 2)
    short = [
        "optim.steps=2",
        "optim.warmup_steps=1",
        "teacher.warmup_teacher_temp_steps=1",
        "optim.freeze_last_layer_steps=1",
    ]
    monkeypatch.setattr(trajectories, "SMALL", [*trajectories.SMALL, *short])
    for name in ("first", "second"):
        trajectories.main(["--recipes", "debug", "--output", str(tmp_path / f"{name}.json")])
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert [set(losses) for losses in first["debug"]["losses"]] == [
        {"loss/dino", "loss/ibot", "loss/koleo", "loss/reconstruction"}
    ] * 2
    trajectories.main(["--recipes", "cifar10/disabled", "--output", str(tmp_path / "other.json")])
    other = json.loads((tmp_path / "other.json").read_text())["cifar10/disabled"]
    assert other["teacher_sha256"] != first["debug"]["teacher_sha256"]
