import argparse
import json
import time

import pytest
import torch

from dinov2_eq.tools import eval_speed

CPU = torch.device("cpu")
SMALL = "--repeats 1 --train-images 200 --val-images 3 --classes 20 --batch-size 1 --image-size 32 --device cpu"


def small() -> argparse.Namespace:
    return eval_speed.build_parser().parse_args(SMALL.split())


def test_the_fastest_run_of_each_counts_after_a_warm_up(monkeypatch):
    """The clock only advances where a contestant says so; the first run of each is its fastest, and does not count."""
    now, calls = [0.0], []
    durations = {"ours": iter([0.5, 3.0, 2.0, 4.0]), "reference": iter([0.1, 9.0, 7.0, 6.0])}
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def contestant(name):
        def run():
            calls.append(name)
            now[0] += next(durations[name])

        return run

    speeds = eval_speed.compare_speed(contestant("ours"), contestant("reference"), repeats=3, device=CPU)
    assert speeds == {"ours": 2.0, "reference": 6.0, "ratio": 3.0}
    assert calls == ["ours", "reference"] * 4


def test_both_comparisons_are_printed(capsys):
    eval_speed.main(SMALL.split())
    result = json.loads(capsys.readouterr().out)
    assert result["device"].startswith("cpu") and all(result[name]["ratio"] > 0 for name in ("knn", "features"))


def test_k_nn_with_other_scores_is_not_timed(monkeypatch):
    def without_temperature(train, labels, val, ks, temperature):
        return knn_predict(train, labels, val, ks, 1.0)

    knn_predict = eval_speed.knn_predict
    monkeypatch.setattr(eval_speed, "knn_predict", without_temperature)
    with pytest.raises(AssertionError, match="not close"):
        eval_speed.knn_contestants(small(), CPU)


def test_the_backbones_that_are_timed_have_the_same_size_of_features():
    ours, timms = eval_speed.feature_contestants(small(), CPU)
    assert ours().shape == timms().shape == (1, 384)
