"""A sweep's file: what its grid expands to, and mistakes in it."""

import pytest

from dinov2_eq.config.load import find_recipe, load_config
from dinov2_eq.run.sweep_file import read_sweep

SWEEP = """
base: debug
overrides: [optim.base_lr=0.002]
grid:
  equivariance.num_intermediates: [1, 3]
  view: {papers: [equivariance.view=second, equivariance.invariant_projection=true], ours: []}
  crops.jitter: [[0.4, 0.4, 0.4, 0.1], [0.0, 0.0, 0.0, 0.0]]
rows:
  plain: [equivariance.enabled=false]
seeds: [0, 7]
data: {train: "Shapes:split=TRAIN:num=8", val: "Shapes:split=VAL:num=8"}
evaluations: {knn: {nb_knn: 3}, other: {program: knn, val-dataset: "Shapes:num=5"}}
"""


def read(tmp_path, text, *args):
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return read_sweep(path, *args)


def test_every_combination_once_with_every_seed(tmp_path):
    """Against three loops: the config that each row resolves to."""
    sweep = read(tmp_path, SWEEP, ["optim.steps=20"])
    expected = []
    for intermediates in (1, 3):
        for view, projection in (("second", True), ("third", False)):
            for jitter in ([0.4, 0.4, 0.4, 0.1], [0.0] * 4):
                for seed in (0, 7):
                    expected.append((True, intermediates, view, projection, jitter, seed))
    default = load_config("debug")
    expected += [(False, 2, "third", False, default.crops.jitter, seed) for seed in (0, 7)]
    found = []
    for row in sweep.rows:
        config = load_config(row.recipe, row.overrides)
        task = config.equivariance
        settings = (task.enabled, task.num_intermediates, task.view, task.invariant_projection)
        found.append((*settings, config.crops.jitter, config.train.seed))
        assert (config.optim.base_lr, config.optim.steps) == (0.002, 20)
        assert config.train.dataset_path == "Shapes:split=TRAIN:num=8"
    assert found == expected
    assert len({row.folder_name for row in sweep.rows}) == len(expected)
    assert sweep.rows[0].folder_name == "num_intermediates_1-view_papers-jitter_0.4_0.4_0.4_0.1-seed_0"
    assert [row.label for row in sweep.rows[-2:]] == ["plain", "plain"]


def test_data_of_the_command_line_and_of_an_evaluation(tmp_path):
    sweep = read(tmp_path, SWEEP, [], "Shapes:num=9")
    assert load_config(sweep.rows[0].recipe, sweep.rows[0].overrides).train.dataset_path == "Shapes:num=9"
    val = "Shapes:split=VAL:num=8"
    assert sweep.evaluations == {
        "knn": {"train-dataset": "Shapes:num=9", "val-dataset": val, "nb_knn": 3},
        "other": {"train-dataset": "Shapes:num=9", "val-dataset": "Shapes:num=5", "program": "knn"},
    }


def test_equal_last_words_are_written_out(tmp_path):
    grid = "{dino.loss_weight: [1.0], equivariance.loss_weight: [0.1, 5.0]}"
    sweep = read(tmp_path, f"base: debug\ngrid: {grid}\nevaluations: {{knn: {{}}}}")
    assert [row.label for row in sweep.rows] == [
        f"dino.loss_weight=1.0, equivariance.loss_weight={weight}" for weight in (0.1, 5.0)
    ]


def test_a_base_beside_the_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: debug\noptim: {steps: 30}\n")
    sweep = read(tmp_path, "base: mine.yaml\nrows: {a: }\nevaluations: {knn: }")
    assert load_config(sweep.rows[0].recipe, sweep.rows[0].overrides).optim.steps == 30


OK = "base: debug\nrows: {a: []}\nevaluations: {knn: {}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (OK + "optim: {steps: 3}", "unknown section 'optim'; known are base, overrides"),
        (OK.replace("debug", "[debug]"), r"needs 'base', the name of a recipe .* got \['debug'\]"),
        (OK.replace("rows: {a: []}", "seeds: [1]"), "has no rows; give 'grid'"),
        (OK.replace("rows: {a: []}", "grid: [a]"), "'grid' must be names or keys"),
        (OK.replace("rows: {a: []}", "grid: {optim.steps: 3}"), "optim.steps must be a list of values.* got 3"),
        (OK.replace("rows: {a: []}", "grid: {optim.steps: []}"), "optim.steps must be a list of values"),
        (OK.replace("rows: {a: []}", "grid: {K: {two: x=1}}"), "two must be a list of key=value"),
        (OK.replace("[]", "optim.steps=3"), "a must be a list of key=value.* got 'optim.steps=3'"),
        (OK.replace("[]", "[optim.steps]"), "a must be a list of key=value"),
        (OK.replace("{a: []}", "{a b: [], a/b: []}"), "'a b' and 'a/b' with seed 0 would both go to the folder a_b"),
        (OK + "seeds: [0, 0]", "with seed 0 would both go"),
        *((OK + f"seeds: {seeds}", "seeds must be a list of whole numbers from 0") for seeds in ("3", "[]", "[-1]")),
        (OK.replace("{knn: {}}", ""), "needs 'evaluations'"),
        (OK.replace("knn", "../knn"), "'../knn' is to name a folder"),
    ],
)
def test_a_mistake_is_named(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/sweep.yaml")


@pytest.mark.parametrize("override", ["train.seed=3", "equivariance.enabled=true", "crops.jitter=[0,0,0,0]"])
def test_the_command_line_does_not_undo_a_row(tmp_path, override):
    with pytest.raises(ValueError, match=f"{override.partition('=')[0]} itself, row by row; change its"):
        read(tmp_path, SWEEP, [override])


def test_unknown_names(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"sweep\.yaml: base: debugg: no such file; packaged recipes are "):
        read(tmp_path, OK.replace("debug", "debugg"))
    with pytest.raises(FileNotFoundError, match="--config-file nothing: no such file"):
        find_recipe("nothing", kind="sweep")
