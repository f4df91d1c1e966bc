"""Many evaluations from one list: one table, nothing done twice, a failure kept to itself."""

import csv
import json

import pytest

from dinov2_eq.run.cli import main
from tests.report.reading import Page

SHAPES = "'Shapes:split={}:num=30:size=32'"
DATA = f"{{train-dataset: {SHAPES.format('TRAIN')}, val-dataset: {SHAPES.format('VAL')}, num-workers: 0"
LIST = f"""
encoders: {{one: random:vit_tiny/16@32, two: random:vit_tiny/8@32}}
evaluations:
  knn: {DATA}, nb_knn: [3, 5]}}
  logreg: {DATA}, max-train-iters: 20}}
"""


def run(tmp_path, text: str, *flags: str) -> int:
    (tmp_path / "list.yaml").write_text(text)
    try:
        return main(
            ["eval", "all", "--config-file", str(tmp_path / "list.yaml"), "--output-dir", str(tmp_path / "out"), *flags]
        )
    except SystemExit as stop:
        return stop.code


def times_of_results(tmp_path) -> dict[str, int]:
    """Of each evaluation of each encoder: when its results were written."""
    paths = (tmp_path / "out").rglob("results_eval_*.json")
    return {str(path.parent.relative_to(tmp_path / "out")): path.stat().st_mtime_ns for path in paths}


def test_one_table_of_all_nothing_twice_and_a_failure_kept_to_itself(tmp_path, capsys):
    assert run(tmp_path, LIST) == 0
    table = capsys.readouterr().out
    assert "knn: full 5 top1" in table and "| two |" in table
    with (tmp_path / "out/summary.csv").open() as file:
        header, *rows = list(csv.reader(file))
    assert [row[0] for row in rows] == ["one", "two"] and all(cell for row in rows for cell in row)
    knn = json.loads((tmp_path / "out/two/knn/results_eval_knn.json").read_text())
    found = float(rows[1][header.index("knn: full 5 top1")])
    assert found == pytest.approx(knn["results"]["full"]["5"]["top1"], rel=1e-3)
    page = Page((tmp_path / "out/summary.html").read_text())
    assert ["knn: full 5 top1", *(row[header.index("knn: full 5 top1")] for row in rows)] in page.rows

    before = times_of_results(tmp_path)
    text = LIST.replace("one: random:vit_tiny/16@32", "one: does/not/exist.pth")
    assert run(tmp_path, text.replace("nb_knn: [3, 5]", "nb_knn: [3, 4]")) == 2
    table = capsys.readouterr().out
    assert "one, knn: failed; dinov2-eq:" in table and "does/not/exist.pth" in table
    after = times_of_results(tmp_path)
    assert before.keys() == {"one/knn", "one/logreg", "two/knn", "two/logreg"}
    assert after.keys() == {"two/knn", "two/logreg"}  # what failed now shows no older numbers
    assert after["two/knn"] > before["two/knn"] and after["two/logreg"] == before["two/logreg"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoders: {a: b}", "needs the section 'evaluations'"),
        ("encoders: {a: b}\nevaluations: {knm: {}}", "evaluation 'knm' has no program; give program: knn | linear"),
        ("encoders: {a: b}\nevaluations: {knn: {}}\nmore: 1", "unknown section 'more'"),
        ("encoders: {a: [b", "is not valid YAML"),
    ],
)
def test_a_list_with_a_mistake(tmp_path, capsys, text, message):
    assert run(tmp_path, text) == 2
    assert message in capsys.readouterr().err
