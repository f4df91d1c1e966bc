"""k-NN and R2 over the steps of a continued run, from files as the trainer and the probe write them."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.tools import curve


def write_run(folder, knn, r2, start):
    """A run folder with k-NN by step, and R2 of its checkpoints and of the weights that it started from."""
    (folder / "curve").mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(load_config("debug")))
    lines = [{"step": step, "eval/knn_top1": value} for step, value in knn.items()] + [{"step": 5, "lr": 0.1}]
    (folder / "training_metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows, summary, encoders = [], [], {}
    for step, value in r2.items():
        name = f"eval/training_{step}" if step else "start.pth"
        path = folder.resolve() / name / "teacher_checkpoint.pth" if step else start
        encoders[name] = {"checkpoint": str(path), "step": step or 2400}
        shared = {"encoder": name, "r2_pooled": value}
        rows += [{**shared, "task": "rotation", "border": "canvas"}, {**shared, "task": "blur", "border": "none"}]
        rows += [{"encoder": name, "task": "rotation", "border": "zeros", "r2_pooled": 0.99}]
        summary += [{**shared, "name": "mean_border_free"}, {**shared, "name": "mean_zeros", "r2_pooled": 0.98}]
    results = {"protocol": {"epochs": 15}, "encoders": encoders, "rows": rows, "summary": summary}
    (folder / "curve/results_eval_equivariance.json").write_text(json.dumps(results))
    return folder


def test_numbers_by_step(tmp_path, capsys):
    start = tmp_path / "start.pth"
    run = write_run(tmp_path / "a", {0: 61.5, 10: 61.0, 20: 62.0}, {20: 0.7, 0: 0.5, 10: 0.6}, start)
    other = write_run(tmp_path / "b", {0: 61.5, 10: 63.0}, {0: 0.5, 10: 0.4, 15: 0.3}, start)
    curve.main([f"task={run}", f"plain={other}", "--output", str(tmp_path / "out/curve.json")])
    found = json.loads((tmp_path / "out/curve.json").read_text())
    assert found["protocols"]["task"] == {"epochs": 15}
    expected = [(0, 61.5, 0.5), (10, 61.0, 0.6), (20, 62.0, 0.7)]
    for row, (step, knn, r2) in zip(found["curves"]["task"], expected, strict=True):
        assert row == {"step": step, "knn_top1": knn, "rotation": r2, "blur": r2, "mean_border_free": r2}
    assert [row["step"] for row in found["curves"]["plain"]] == [0, 10]  # no k-NN at 15
    table = (tmp_path / "out/curve.md").read_text()
    assert "| task | 20 | 62.00 | 0.700 | 0.700 |" in table and table == capsys.readouterr().out
    assert ElementTree.parse(tmp_path / "out/curve.svg").getroot().tag.endswith("svg")


def test_what_is_missing_is_named(tmp_path, capsys):
    run = write_run(tmp_path / "a", {7: 60.0}, {10: 0.5}, tmp_path / "start.pth")
    with pytest.raises(ValueError, match="no step with both k-NN and R2"):
        curve.main([f"task={run}", "--output", str(tmp_path / "curve.json")])
    probe = run / "curve/results_eval_equivariance.json"
    for damaged in ("", "[]", "{}", '{"protocol": {}, "encoders": {"a": {}}}', probe.read_text()[:-20]):
        probe.write_text(damaged)
        with pytest.raises(ValueError, match=f"^{probe} "):
            curve.main([f"task={run}", "--output", str(tmp_path / "curve.json")])
    probe.unlink()
    with pytest.raises(FileNotFoundError, match=r"eval equivariance --output-dir .*a/curve' makes it"):
        curve.main([f"task={run}", "--output", str(tmp_path / "curve.json")])
    with pytest.raises(SystemExit):
        curve.main([str(run), "--output", str(tmp_path / "curve.json")])
    assert "write NAME=RUN" in capsys.readouterr().err
    assert not list(tmp_path.glob("curve.*"))
