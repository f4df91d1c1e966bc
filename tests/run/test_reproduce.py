"""A table of a paper made again: published numbers where they belong, ours beside them, and the budget in steps."""

import json
from pathlib import Path

import pytest

from dinov2_eq.config.load import find_recipe, load_config, to_dict
from dinov2_eq.config.yaml_files import read_yaml
from dinov2_eq.run import reproduce
from dinov2_eq.run.published import BUDGET, PAPER, read_table
from dinov2_eq.run.reproduce import build_parser, sweep_of
from dinov2_eq.run.sweep import plan
from tests.helpers import TINY, in_this_process, stand_in_for_programs
from tests.report.reading import Page
from tests.run.test_sweep import TRAIN, VAL, leave_results

ROOT = Path(__file__).parents[2]
TABLES = sorted(path.stem for path in (ROOT / "configs/reproduce").glob("*.yaml"))
SMALL = [word for word in TINY if not word.startswith(("optim.", "teacher."))]
TABLE = f"""
title: A paper
columns: {{rotation: rotation, blur: blur}}
theirs: {{backbone: a large one, border: black}}
forms: {{small: {json.dumps(SMALL)}}}
scales:
  budget:
    data: {{train: "{TRAIN}", val: "{VAL}"}}
    evaluations:
      knn: {{nb_knn: [3, 5], num-workers: 0}}
      equivariance: {{tasks: [rotation, blur], epochs: 1, hidden-dim: 8, num-workers: 0}}
rows:
  theirs:
    published: [0.125, 0.375]
    source: Table 7
    open: it is not in the code
  task:
    published: [0.625, null]
    source: Table 7
    note: another decoder
    budget: [debug, small]
  plain:
    budget: [debug, small, equivariance.enabled=false]
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "table.yaml").write_text(TABLE)
    return tmp_path / "out"


def run(folder: Path, *flags: str, budget: str = "2") -> int:
    words = ["reproduce", f"{folder.parent}/table.yaml", "--budget", budget, "--output-dir", str(folder)]
    return in_this_process([*words, *flags])


@pytest.fixture
def seconds(monkeypatch) -> list[bool]:
    """A step takes 0.5 s with the task and 0.25 s without; filled with what was measured."""
    measured = []

    def seconds_per_step(config):
        measured.append(config.equivariance.enabled)
        return 0.5 if config.equivariance.enabled else 0.25

    monkeypatch.setattr(reproduce, "seconds_per_step", seconds_per_step)
    return measured


def leave_r2(words: list[str]) -> int:
    """As `leave_results`, and with an R2 that says what it is of."""
    if words[1] != "equivariance":
        return leave_results(words)
    folder = Path(words[words.index("--output-dir") + 1])
    task = 0.25 if "plain" in folder.parent.name else 0.5
    rows = [
        {"encoder": name, "tokens": "both", "task": of, "border": border, "r2_mean": 0.0, "r2_components": {}}
        | {"r2_pooled": 0.0 if name == "random-init" else task + extra}
        for name in ("trained", "random-init")
        for of, border, extra in (
            *(("rotation", "zeros", 0.25), ("rotation", "masked", 0.125), ("rotation", "canvas", 0.0)),
            *(("blur", "none", 0.1875), ("blur", "masked", 0.0625)),
        )
    ]
    found = {"protocol": {}, "encoder": {"step": 240}, "rows": rows, "summary": [], "variants": {"rows": []}}
    (folder / "results_eval_equivariance.json").write_text(json.dumps(found))
    return 0


def test_published_numbers_and_ours_side_by_side(folder, monkeypatch, capsys, seconds):
    calls = stand_in_for_programs(monkeypatch, leave_r2)
    assert run(folder, "--seeds", "2") == 0
    assert len(calls) == 2 * 2 * 3 and sorted(seconds) == [False, True]
    assert "optim.steps=240" in calls[0]  # 2 minutes of the slower row, and so in every row
    assert all("optim.steps=240" in words for words in calls if words[0] == "train")
    text = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["row", "", "rotation", "blur", "mean", "5-NN %"]
    expected = [
        ["theirs", "published", "0.125", "0.375", "0.250", ""],
        ["task", "published", "0.625", "", "", ""],
        ["", "ours, black borders", "0.750 ± 0.000", "0.688 ± 0.000", "0.719 ± 0.000", ""],
        ["", "ours, masked", "0.625 ± 0.000", "0.562 ± 0.000", "0.594 ± 0.000", ""],
        ["", "ours, real borders", "0.500 ± 0.000", "0.688 ± 0.000", "0.594 ± 0.000", "50.0 ± 0.0"],
        ["plain", "ours, black borders", "0.500 ± 0.000", "0.438 ± 0.000", "0.469 ± 0.000", ""],
    ]
    assert rows[2:8] == expected
    assert "- theirs: Table 7; open: it is not in the code" in text and "- task: Table 7; another decoder" in text
    assert "| backbone | a large one | vit_tiny of depth 1, patches of 8, images of 32 pixels |" in text
    assert "| schedule |  | 240 steps of 4 images |" in text and "| budget |  | 2 minutes for each row |" in text
    page = Page((folder / "reproduction.html").read_text())
    assert [cell.strip() for cell in expected[3]] in page.rows and page.images
    found = json.loads((folder / "reproduction.json").read_text())
    assert found["rows"][1]["published"] == {"rotation": 0.625} and len(found["rows"][1]["ours"]["black"]) == 2
    assert (folder / "reproduction.svg").is_file()
    # The same command does nothing twice, and measures nothing again.
    assert run(folder, "--seeds", "2") == 0 and len(calls) == 12 and len(seconds) == 2


def test_a_row_that_failed_is_not_done_yet(folder, monkeypatch, capsys, seconds):
    calls = stand_in_for_programs(monkeypatch, lambda words: 3 if "plain" in " ".join(words) else leave_r2(words))
    assert run(folder) == 2
    assert "- plain: not done yet" in capsys.readouterr().out
    calls.clear()
    stand_in_for_programs(monkeypatch, leave_r2)
    assert run(folder) == 0 and "not done yet" not in capsys.readouterr().out


def test_from_images_to_the_table(folder, monkeypatch):
    """Real timings, trainings and probes."""
    monkeypatch.setattr(reproduce, "MIN_STEPS", 1)
    calls = stand_in_for_programs(monkeypatch, in_this_process)
    assert run(folder, budget="0.03") == 0 and len(calls) == 2 * 3
    found = json.loads((folder / "reproduction.json").read_text())
    begun = json.loads((folder / "budget.json").read_text())
    assert begun["steps"] == int(60 * 0.03 / max(begun["seconds_per_step"].values()))
    assert [len(row["ours"]["real"]) for row in found["rows"]] == [0, 1, 1, 1]
    assert (folder / f"plain-seed_0/eval/training_{begun['steps']}").is_dir()


def test_warm_ups_keep_their_share(folder, monkeypatch, seconds):
    stand_in_for_programs(monkeypatch, leave_r2)
    assert run(folder) == 0
    before, config = load_config("debug"), read_yaml(folder / "task-seed_0/config.yaml")
    assert config["optim"]["steps"] == 240
    for section, key in (("optim", "warmup_steps"), ("teacher", "warmup_teacher_temp_steps")):
        share = getattr(getattr(before, section), key) / before.optim.steps
        assert config[section][key] == round(share * 240)


@pytest.mark.parametrize(
    ("flags", "budget", "message"),
    [
        ((), "0.01", "'task' makes 1 steps in it, of 0.50 s each, and less than 50 say nothing; give --budget 0.46"),
        ((), "-1", "must be minutes above 0, or paper, got -1"),
        ((), "soon", "must be minutes above 0, or paper, got soon"),
        (("optim.steps=5",), "2", "optim.steps cannot be given here: --budget sets it"),
        (("equivariance.enabled=true",), "2", "table.yaml sets it, row by row"),
        (("train.seed=3",), "2", "table.yaml sets it, row by row"),
        (("train.sed=3",), "2", "table.yaml: row 'task': command line: unknown key 'train.sed'. Did you mean"),
        (("--submit", "--partition gpu"), "2", "minutes are measured on this machine"),
    ],
)
def test_mistakes_in_the_command(folder, monkeypatch, capsys, seconds, flags, budget, message):
    calls = stand_in_for_programs(monkeypatch, leave_r2)
    assert run(folder, *flags, budget=budget) == 2 and not calls and not (folder / "budget.json").exists()
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_another_budget(folder, monkeypatch, capsys, seconds):
    stand_in_for_programs(monkeypatch, leave_r2)
    assert run(folder) == 0
    capsys.readouterr()
    assert run(folder, budget="3") == 2
    assert "was begun with --budget 2, not 3; give that, or another --output-dir" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title: A paper", "", "section 'title' is missing or unknown"),
        ("title: A paper", "title: A paper\ntitel: A", "section 'titel' is missing or unknown"),
        ("[0.125, 0.375]", "[0.125]", "row 'theirs' has 1 published numbers for 2 columns"),
        ("[0.125, 0.375]", "[a, 0.375]", "is not as this version writes it"),
        ("    source: Table 7\n    open", "    open", "row 'theirs' has published numbers without their source"),
        ("note: another", "not: another", "row 'task' has the unknown entry 'not'"),
        ("[debug, small]", "[debug, smal]", "KeyError: 'smal'"),
        ("[debug, small]", "[debugg, small]", "row 'task': debugg: no such file; packaged recipes are"),
    ],
)
def test_mistakes_in_a_table(folder, capsys, old, new, message):
    (folder.parent / "table.yaml").write_text(TABLE.replace(old, new))
    assert run(folder) == 2 and not folder.exists()
    error = capsys.readouterr().err
    assert message in error and "table.yaml" in error and "Traceback" not in error


def test_an_unknown_table(tmp_path, capsys):
    assert in_this_process(["reproduce", "paper-z", "--budget", "5", "--output-dir", str(tmp_path / "out")]) == 2
    assert f"reproduce paper-z: no such file; packaged recipes are {', '.join(TABLES)}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("budget", "reason"), [("paper", "the paper's schedule is not known"), ("2", "there is no small recipe")]
)
def test_nothing_to_run(folder, capsys, budget, reason):
    """Without recipes every row is open, and the published numbers are there all the same."""
    text = "".join(line for line in TABLE.splitlines(keepends=True) if "budget: [" not in line)
    (folder.parent / "table.yaml").write_text(text + "    note: ours\n")
    assert run(folder, budget=budget) == 0
    text = capsys.readouterr().out
    assert "| theirs | published | 0.125 | 0.375 | 0.250 |" in text
    assert f"- plain: ours; open: {reason}" in text


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("scale", [BUDGET, PAPER])
def test_a_packaged_table_can_run(name, scale, tmp_path):
    """Every row of ours loads, and no two are the same."""
    table = read_table(find_recipe(name, kind="reproduce"), scale)
    words = [name, "--budget", "paper" if scale == PAPER else "5", "--output-dir", str(tmp_path)]
    sweep = sweep_of(table, build_parser().parse_args(words))
    assert len(sweep.rows) == sum(not system.open for system in table.systems)
    if sweep.rows:
        planned = plan(sweep, tmp_path)
        configs = [json.dumps(to_dict(each.config)) for each in planned]
        assert len(set(configs)) == len(configs)
        assert all(0 <= number <= 1 for system in table.systems for number in system.published.values())


def test_numbers_against_the_means_that_were_published():
    """Paper A's Table 1 has a column for the mean, which the files do not have."""
    means = [0.610, 0.355, 0.542, 0.525, 0.592, 0.878, 0.954, 0.968, 0.967, 0.958, 0.971, 0.960]
    table = read_table(find_recipe("paper-a-synthetic", kind="reproduce"), BUDGET)
    rows = [system.published for system in table.systems if system.source == "paper A, Table 1"]
    assert [sum(row.values()) / len(row) for row in rows] == pytest.approx(means, abs=0.001)


def test_the_papers_form_is_that_of_the_recipe():
    """Tables spell it out, to put it on recipes that have none with it."""
    expected = {
        f"equivariance.{key}": value for key, value in read_yaml(find_recipe("paper_task"))["equivariance"].items()
    }
    for name in ("paper-a-synthetic", "paper-b-cifar10"):
        words = read_yaml(find_recipe(name, kind="reproduce"))["forms"]["papers"]
        config = to_dict(load_config("debug", words))["equivariance"]
        assert {key: config[key.removeprefix("equivariance.")] for key in expected} == expected
        assert {word.partition("=")[0] for word in words} == {*expected, "equivariance.border"}
