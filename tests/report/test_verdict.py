"""The first sentence of the report says what the numbers say."""

import json
import re

import pytest

from dinov2_eq.report import load_runs, render_page
from dinov2_eq.report.verdict import verdict
from tests.report.test_page import write_run


def runs_with(tmp_path, ours, theirs, num_images=10000):
    """A run with the task and its control; each gets (R2 of rotation, R2 of blur, top-1), None: not measured."""
    folders = []
    for name, weight, (rotation, blur, top1) in (("task", 1.0, ours), ("control", 0.0, theirs)):
        folder = write_run(tmp_path / name, loss_weight=weight, evaluated=False)
        rows = [
            {
                "encoder": encoder,
                "tokens": "both",
                "task": task,
                "border": border,
                "r2_pooled": value,
                "r2_mean": 0,
                "r2_components": {},
            }
            for task, score in (("rotation", rotation), ("blur", blur))
            if score is not None
            for border, value in (("zeros", 0.99), ("none" if task == "blur" else "canvas", score))
            for encoder, value in (("random-init", 0.5), ("trained", value))
        ]
        (folder / "results_eval_equivariance.json").write_text(json.dumps({"rows": rows}))
        if top1 is not None:
            knn = {
                "protocol": {"num_val_images": num_images},
                "results": {"full": {"20": {"top1": top1, "top5": 90.0}}},
            }
            (folder / "results_eval_knn.json").write_text(json.dumps(knn))
        folders.append(folder)
    return load_runs(folders)


def words(html):
    return re.sub(r"<[^>]*>", "", html.partition("</p>")[0])


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (
            (0.75, 0.95, 54.0),
            (0.43, 0.95, 54.4),
            "raised the mean R² of rotation, blur by 0.16 and left k-NN accuracy equal within the error of sampling "
            "(-0.4 ± 0.7 points)",
        ),
        (
            (0.75, None, 51.8),
            (0.43, 0.95, 54.4),
            "raised R² of rotation by 0.32 and cost 2.6 points of k-NN accuracy (± 0.7)",
        ),
        ((0.40, None, 54.4), (0.43, None, 51.8), "lowered R² of rotation by 0.03 and gained 2.6 points of k-NN"),
        ((0.44, None, None), (0.43, None, 51.8), "did not change R² of rotation (+0.01) (A task against B control)."),
        ((None, None, 54.4), (0.43, None, 54.4), "The task left k-NN accuracy equal"),
    ],
)
def test_what_changed(tmp_path, ours, theirs, expected):
    assert expected in words(verdict(runs_with(tmp_path, ours, theirs)))


def test_few_test_images_leave_more_open(tmp_path):
    """The standard error of a difference of two shares: 100 * sqrt(2 * 0.53 * 0.47 / 300) = 4.1 points."""
    html = verdict(runs_with(tmp_path, (0.75, None, 50.4), (0.43, None, 55.4), num_images=300))
    assert "equal within the error of sampling (-5.0 ± 4.1 points)" in words(html)
    assert "<td>0.750</td><td>0.430</td><td>+0.320</td>" in html and "<td>50.4</td><td>55.4</td><td>-5.0</td>" in html


def test_layout_read_outs_stand_beside_the_pooled_one(tmp_path):
    task, control = runs_with(tmp_path, (0.75, None, 54.0), (0.43, None, 54.4))
    for run, score in ((task, 0.88), (control, 0.84)):
        row = {**run.equivariance["rows"][-1], "tokens": "grid2", "r2_pooled": score}
        linear = {**row, "head": "linear", "r2_pooled": 0.1}
        run.equivariance["variants"] = {"rows": [row, linear]}
    html = verdict([task, control])
    assert "raised R² of rotation by 0.32" in words(html)  # of the main read-out
    assert "R² of rotation, mean patch tokens of the quarters" in html and "<td>0.880</td><td>0.840</td>" in html


def test_it_comes_first_and_only_with_a_control(tmp_path):
    task, control = runs_with(tmp_path, (0.75, 0.95, 54.0), (0.43, 0.95, 54.4))
    page = render_page([task, control], {})
    assert re.findall(r'<section id="([^"]*)"', page)[:2] == ["verdict", "reconstructions"]
    for alone in (task, control):
        assert 'id="verdict"' not in render_page([alone], {})


def test_without_evaluations_there_is_none(tmp_path):
    assert verdict(runs_with(tmp_path, (None, None, None), (None, None, None))) == ""
