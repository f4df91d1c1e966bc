"""A sweep trains and evaluates every row once, goes on where it was stopped, and refuses rows of other settings."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dinov2_eq.config.load import find_recipe, load_config, to_yaml
from dinov2_eq.evaluation.programs import Programs
from dinov2_eq.report.runs import load_runs
from dinov2_eq.run.sweep import plan
from dinov2_eq.run.sweep_file import read_sweep
from tests.helpers import TINY, in_this_process, stand_in_for_programs

ROOT = Path(__file__).parents[2]
TRAIN, VAL = "Shapes:split=TRAIN:num=24:size=32", "Shapes:split=VAL:num=16:size=32"
SWEEP = f"""
base: debug
overrides: {json.dumps([word for word in TINY if not word.startswith("optim.steps")] + ["optim.steps=3"])}
grid: {{equivariance.num_intermediates: [1]}}
rows: {{plain: [equivariance.enabled=false]}}
data: {{train: "{TRAIN}", val: "{VAL}"}}
evaluations:
  knn: {{nb_knn: [3, 5], num-workers: 0}}
  equivariance: {{tasks: [rotation, blur], tokens: [both, grid2], epochs: 1, hidden-dim: 8, num-workers: 0}}
  few: {{program: logreg, max-train-iters: 5, num-workers: 0}}
"""
ROWS = ("num_intermediates_1-seed_0", "plain-seed_0")


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "sweep.yaml").write_text(SWEEP)
    return tmp_path / "out"


def run(folder: Path, *flags: str) -> int:
    return in_this_process(
        ["sweep", "--config-file", f"{folder.parent}/sweep.yaml", "--output-dir", str(folder), *flags]
    )


def leave_results(words: list[str]) -> int:
    """What the programs of a sweep leave behind, without their work."""
    given = words[2:] if words[0] == "eval" else words[1:]
    folder = Path(given[given.index("--output-dir") + 1])
    if words[0] == "train":
        overrides = [word for word in given if "=" in word and not word.startswith("--")]
        config = load_config(given[given.index("--config-file") + 1], overrides)
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "environment.json").write_text('{"device": "cpu", "commit": "abc"}')
        teacher = folder / f"eval/training_{config.optim.steps}/teacher_checkpoint.pth"
        teacher.parent.mkdir(parents=True)
        teacher.touch()
    elif words[1] == "knn":
        results = {"protocol": {"num_val_images": 16}, "results": {"full": {"3": {"top1": 40.0}, "5": {"top1": 50.0}}}}
        (folder / "results_eval_knn.json").write_text(json.dumps(results))
    else:
        (folder / f"results_eval_{words[1]}.json").write_text('{"results": {"top1": 30.0}}')
    return 0


def without_equivariance(folder: Path) -> None:
    text = "".join(line for line in SWEEP.splitlines(keepends=True) if "tasks:" not in line)
    (folder.parent / "sweep.yaml").write_text(text)


def test_two_rows_from_images_to_the_table(folder, monkeypatch, capsys):
    calls = stand_in_for_programs(monkeypatch, in_this_process)
    assert run(folder) == 0
    assert len(calls) == 2 * 4
    table = capsys.readouterr().out
    results = json.loads((folder / "sweep.json").read_text())
    assert [(row["run"], row["state"], row["kind"]) for row in results["rows"]] == [
        (ROWS[0], "done", "task"),
        (ROWS[1], "done", "base method"),
    ]
    header, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    numbers = dict(zip(header, lines[0], strict=True))
    # Against the results files themselves.
    knn = json.loads((folder / ROWS[0] / "knn/results_eval_knn.json").read_text())["results"]["full"]
    assert numbers["5-NN %"] == f"{knn['5']['top1']:.1f}"
    equivariance = json.loads((folder / ROWS[0] / "equivariance/results_eval_equivariance.json").read_text())
    (rotation,) = [
        row["r2_pooled"]
        for row in equivariance["rows"]
        if (row["encoder"], row["task"], row["border"]) == ("trained", "rotation", "canvas")
    ]
    assert numbers["R2 rotation"] == f"{rotation:.3f}" and "R2 mean, quarters" in numbers
    assert any(name.startswith("few: ") for name in numbers) and lines[2][0] == "untrained vit_tiny"
    assert load_runs([folder / ROWS[0]])[0].knn["results"]["full"] == knn  # a report finds it
    assert (folder / "sweep.svg").read_text().startswith("<?xml")
    assert not list(folder.rglob(".features"))
    assert run(folder) == 0 and len(calls) == 8


def test_what_is_done_is_skipped_and_what_is_not_runs_again(folder, monkeypatch, capsys):
    """Training or an evaluation fails in one row: the other row is there, and later only what is missing runs."""
    without_equivariance(folder)
    broken = ["train", ROWS[0]]

    def carry_out(words: list[str]) -> int:
        if broken and words[0] == broken[0] and any(broken[1] in word for word in words):
            print("dinov2-eq: the disk is full")
            return 2
        return leave_results(words)

    calls = stand_in_for_programs(monkeypatch, carry_out)
    assert run(folder) == 2 and len(calls) == 1 + 3
    table = capsys.readouterr().out
    assert "- num_intermediates=1, seed 0: failed; dinov2-eq: the disk is full (see " in table
    assert "| plain | 1 | 50.0 | 30.0 |" in table and "| num_intermediates=1 | 0 |  |  |" in table
    broken[0] = "eval"
    calls.clear()
    assert run(folder) == 2 and [words[0] for words in calls] == ["train", "eval", "eval"]
    assert "knn: failed dinov2-eq: the disk is full" in capsys.readouterr().out
    broken.clear()
    calls.clear()
    assert run(folder) == 0 and [words[:2] for words in calls] == [["eval", "knn"], ["eval", "logreg"]]
    calls.clear()
    (folder / ROWS[1] / "knn/results_eval_knn.json").write_text("{")
    assert run(folder) == 0 and [words[:2] for words in calls] == [["eval", "knn"]]
    # A new seed is a new row.
    (folder.parent / "sweep.yaml").write_text((folder.parent / "sweep.yaml").read_text() + "seeds: [0, 1]\n")
    calls.clear()
    assert run(folder) == 0 and sum(words[0] == "train" for words in calls) == 2
    assert "| plain | 2 | 50.0 ± 0.0 | 30.0 ± 0.0 |" in capsys.readouterr().out


def test_changed_settings_are_refused(folder, monkeypatch, capsys):
    without_equivariance(folder)
    calls = stand_in_for_programs(monkeypatch, leave_results)
    assert run(folder) == 0
    calls.clear()
    capsys.readouterr()
    assert run(folder, "optim.base_lr=0.5") == 2 and not calls
    error = capsys.readouterr().err
    assert "'num_intermediates=1' is in" in error and "optim.base_lr was 0.001, now 0.5" in error
    assert "another --output-dir, or remove that folder" in error and "Traceback" not in error
    assert run(folder) == 0 and not calls


def test_jobs_are_submitted_step_by_step(folder, monkeypatch, capsys):
    """First the trainings, then their evaluations, each once; the table has what is done."""
    without_equivariance(folder)
    calls = stand_in_for_programs(monkeypatch, lambda words: 0)
    submit = ["--submit", "--partition gpu"]
    assert run(folder, *submit) == 0
    assert [words[:4] for words in calls] == [["submit", "train", "--partition", "gpu"]] * 2
    assert "plain, seed 0: submitted" in capsys.readouterr().out
    assert run(folder, *submit) == 0 and len(calls) == 2
    assert run(folder, *submit, "optim.base_lr=0.5") == 2 and len(calls) == 2  # a queued row has settings too
    assert "optim.base_lr was 0.001, now 0.5" in capsys.readouterr().err
    leave_results(["train", *calls[0][4:]])  # as the job does in the end
    assert run(folder, *submit) == 0
    assert [words[:4] for words in calls[2:]] == [["submit", name, "--partition", "gpu"] for name in ("knn", "logreg")]
    for words in calls[2:]:
        leave_results(["eval", words[1], *words[4:]])
    capsys.readouterr()
    assert run(folder, *submit) == 0 and len(calls) == 4
    assert "| num_intermediates=1 | 1 | 50.0 | 30.0 |" in capsys.readouterr().out
    assert run(folder, *submit, "--resubmit") == 0 and [words[1] for words in calls[4:]] == ["train"]


def test_two_rows_at_a_time(folder, monkeypatch):
    """Each training waits for the other one to begin."""
    without_equivariance(folder)
    both = threading.Barrier(2, timeout=60)

    def run_program(self: Programs, words: list[str], log: Path) -> int:
        log.touch()
        if words[0] == "train":
            both.wait()
        return leave_results(words)

    monkeypatch.setattr(Programs, "run", run_program)
    assert run(folder, "--jobs", "2") == 0
    assert [row["state"] for row in json.loads((folder / "sweep.json").read_text())["rows"]] == ["done", "done"]


def test_a_dry_run_lists_the_rows(folder, monkeypatch, capsys):
    without_equivariance(folder)
    calls = stand_in_for_programs(monkeypatch, leave_results)
    assert run(folder, "--dry-run") == 0 and not calls and not folder.exists()
    assert "to train  plain-seed_0  equivariance.enabled=false" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("num_intermediates: [1]", "num_intermediates: [0]", "row 'num_intermediates=0': "),
        ("num_intermediates", "num_intermediate", "unknown key 'equivariance.num_intermediate'. Did you mean"),
        ("nb_knn", "nb_knnn", "evaluation 'knn': unrecognized arguments: --nb_knnn"),
        ("program: logreg", "program: logistic", "evaluation 'few' has no program; give program: knn | linear"),
        ("grid:", "gird:", "unknown section 'gird'"),
    ],
)
def test_mistakes(folder, monkeypatch, capsys, old, new, message):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    (folder.parent / "sweep.yaml").write_text(SWEEP.replace(old, new))
    assert run(folder) == 2 and not calls and not folder.exists()
    error = capsys.readouterr().err
    assert message in error and f"{folder.parent}/sweep.yaml" in error and "Traceback" not in error


def test_an_unknown_sweep(tmp_path, capsys):
    assert in_this_process(["sweep", "--config-file", "nothing", "--output-dir", str(tmp_path)]) == 2
    assert "--config-file nothing: no such file; packaged recipes are " in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs/sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_packaged_sweep_can_run(path, tmp_path):
    planned = plan(read_sweep(find_recipe(path.stem, kind="sweep")), tmp_path)
    assert len(planned) > 2 and all(len(each.tasks) == 2 for each in planned)
    assert len({to_yaml(each.config) for each in planned}) == len(planned)  # no row twice


@pytest.mark.cluster
@pytest.mark.parametrize("jobs", [1, 2])
def test_sigterm_ends_the_trainings_which_then_resume(folder, jobs):
    """Real programs, which would go on for long."""
    text = SWEEP.replace('"optim.steps=3"', '"optim.steps=100000"')
    (folder.parent / "sweep.yaml").write_text(text)
    words = ["sweep", "--config-file", f"{folder.parent}/sweep.yaml", "--output-dir", str(folder), "--jobs", str(jobs)]
    command = [sys.executable, "-m", "dinov2_eq.run.cli", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if len(list(folder.glob("*/checkpoints/*3"))) >= jobs:
                break
            time.sleep(0.2)
        process.terminate()
        assert "dinov2-eq: stopped by SIGTERM; the same command goes on" in process.stderr.read()
    assert process.returncode == 4
    with pytest.raises(ProcessLookupError):  # its group is empty
        os.killpg(process.pid, signal.SIGTERM)
    logs = [path.read_text() for path in folder.glob("*/train.txt")]
    assert len(logs) == jobs and all("stopped by SIGTERM after step" in log for log in logs)
