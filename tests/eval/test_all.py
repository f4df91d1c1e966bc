"""Many evaluations from one list: one table, nothing done twice, a failure kept to itself."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2_eq.evaluation.summary import read_numbers
from tests.helpers import in_this_process, stand_in_for_programs
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
    return in_this_process([*words(tmp_path), *flags])


def words(tmp_path) -> list[str]:
    return ["eval", "all", "--config-file", str(tmp_path / "list.yaml"), "--output-dir", str(tmp_path / "out")]


def times_of_results(tmp_path) -> dict[str, int]:
    """Of each evaluation of each encoder: when its results were written."""
    paths = (tmp_path / "out").rglob("results_eval_*.json")
    return {str(path.parent.relative_to(tmp_path / "out")): path.stat().st_mtime_ns for path in paths}


def test_one_table_of_all_nothing_twice_and_a_failure_kept_to_itself(tmp_path, monkeypatch, capsys):
    calls = stand_in_for_programs(monkeypatch, in_this_process)
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
    assert len(calls) == 4

    before = times_of_results(tmp_path)
    text = LIST.replace("one: random:vit_tiny/16@32", "one: does/not/exist.pth")
    assert run(tmp_path, text.replace("nb_knn: [3, 5]", "nb_knn: [3, 4]")) == 2
    table = capsys.readouterr().out
    assert "one, knn: failed; dinov2-eq:" in table and "does/not/exist.pth" in table
    after = times_of_results(tmp_path)
    assert before.keys() == {"one/knn", "one/logreg", "two/knn", "two/logreg"}
    assert re.search(r"\| one \|[ |]*\n", table)  # no older numbers of what failed now
    assert after.pop("two/knn") > before.pop("two/knn") and after == before
    num_calls = len(calls)
    assert run(tmp_path, LIST.replace("nb_knn: [3, 5]", "nb_knn: [3, 4]")) == 0
    assert calls[num_calls:] == [calls[-1]] and "one/knn" in " ".join(calls[-1])  # only what differs from before


def test_each_evaluation_is_a_program_of_its_own(tmp_path, capsys):
    text = f"encoders: {{one: random:vit_tiny/16@32, two: no.pth}}\nevaluations:\n  knn: {DATA}, nb_knn: 3}}\n"
    assert run(tmp_path, text) == 2
    assert "two, knn: failed; dinov2-eq: no.pth does not exist" in capsys.readouterr().out
    assert times_of_results(tmp_path).keys() == {"one/knn"}
    assert "loaded" not in (tmp_path / "out/two/knn/log.txt").read_text()


def test_a_run_that_has_trained_on_is_evaluated_again(tmp_path, monkeypatch):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    text = f"encoders: {{run: {tmp_path}/run}}\nevaluations: {{knn: {{}}}}"
    for step, num_calls in ((10, 1), (10, 1), (20, 2), (20, 2)):
        teacher = tmp_path / f"run/eval/training_{step}/teacher_checkpoint.pth"
        if not teacher.exists():
            teacher.parent.mkdir(parents=True)
            teacher.touch()
        assert run(tmp_path, text) == 0 and len(calls) == num_calls
    teacher.write_bytes(b"other weights")
    assert run(tmp_path, text) == 0 and len(calls) == 3


def test_files_that_flags_name(tmp_path, monkeypatch):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    mapping = tmp_path / "mapping.npy"
    flags = f"val-class-mapping-fpath: {mapping}, test-class-mapping-fpaths: [null, {mapping}], epochs: 10"
    text = f"encoders: {{one: random:vit_tiny/16@32}}\nevaluations: {{linear: {{{flags}}}}}"
    for content, num_calls in ((b"one", 1), (b"one", 1), (b"another", 2), (b"another", 2)):
        if not mapping.exists() or mapping.read_bytes() != content:
            mapping.write_bytes(content)
        assert run(tmp_path, text) == 0 and len(calls) == num_calls
    assert calls[0][-5:] == ["--test-class-mapping-fpaths", "None", str(mapping), "--epochs", "10"]


def test_what_is_submitted_is_waited_for(tmp_path, monkeypatch, capsys):
    calls = stand_in_for_programs(monkeypatch, lambda given: 0)
    text = "encoders: {one: random:vit_tiny/16@32}\nevaluations: {knn: {}}"
    for flags in (["--submit", "--partition gpu"], ["--submit", "--partition gpu"], []):
        assert run(tmp_path, text, *flags) == 0 and len(calls) == 1
        assert "one, knn: submitted" in capsys.readouterr().out
    assert calls[0][:4] == ["submit", "knn", "--partition", "gpu"]
    assert run(tmp_path, text, "--submit", "--partition cpu", "--resubmit") == 0 and len(calls) == 2
    leave_results(calls[1])  # as the job does in the end
    capsys.readouterr()
    assert run(tmp_path, text) == 0 and len(calls) == 2
    assert "| one | 50 |" in capsys.readouterr().out


# Or the one would say what the other measured, and no result would be found.
SET_BY_THE_LIST = ("encoder: c", "enc: c", "output-dir: c", "dry-run: true")


def leave_results(given: list[str]) -> int:
    folder = Path(given[given.index("--output-dir") + 1])
    (folder / "results_eval_knn.json").write_text(json.dumps({"results": {"full": {"5": {"top1": 50.0}}}}))
    return 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("encoders: {a: b}", "needs the section 'evaluations'"),
        ("encoders: {a: b}\nevaluations: {knm: {}}", "evaluation 'knm' has no program; give program: knn | linear"),
        ("encoders: {a: b}\nevaluations: {knn: {}}\nmore: 1", "unknown section 'more'"),
        ("encoders: {a: b}\nevaluations: {knn: {}}\nmore: 1\n2: 3", "unknown section '2'"),
        ("encoders: {a: [b", "is not valid YAML"),
        ("", "must hold sections of keys"),
        ("- a\n- b", "must hold sections of keys"),
        ("encoders: &e {a: *e}\nevaluations: {knn: {}}", "is not valid YAML"),
        ("encoders: {a: b, a: c}\nevaluations: {knn: {}}", "found duplicate key a in line 1"),
        ("encoders: {a: '${nowhere}'}\nevaluations: {knn: {}}", "cannot be used: Interpolation key 'nowhere'"),
        ("encoders:\nevaluations: {knn: {}}", "needs the section 'encoders'"),
        ("encoders: a\nevaluations: {knn: {}}", "needs the section 'encoders'"),
        ("encoders: {a: b}\nevaluations: {knn: 5}", "evaluation 'knn' must be flags and their values, got 5"),
        ("encoders: {a: }\nevaluations: {knn: {}}", "encoder 'a' must be one source, such as a run folder, got None"),
        ("encoders: {a: [b, c]}\nevaluations: {knn: {}}", "encoder 'a' must be one source"),
        ("encoders: {../a: b}\nevaluations: {knn: {}}", "'../a' is to name a folder of results"),
        (
            "encoders: {a: b}\nevaluations: {knn: {nb_knnn: 5}}",
            "evaluation 'knn': unrecognized arguments: --nb_knnn 5;",
        ),
        ("encoders: {a: b}\nevaluations: {knn: {batch-size: null}}", "must be a whole number, got 'None'"),
        ("encoders: {a: b}\nevaluations: {linear: {no-resume: false}}", "unrecognized arguments: --no-no-resume"),
        *((f"encoders: {{a: b}}\nevaluations: {{knn: {{{flag}}}}}", "leave out encoder") for flag in SET_BY_THE_LIST),
    ],
)
def test_a_list_with_a_mistake(tmp_path, monkeypatch, capsys, text, message):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    assert run(tmp_path, text) == 2
    error = capsys.readouterr().err
    assert message in error and f"{tmp_path}/list.yaml" in error and not calls


def test_a_file_that_is_no_text(tmp_path, capsys):
    (tmp_path / "list.yaml").write_bytes(b"\xff\xfe\x00")
    assert in_this_process(words(tmp_path)) == 2
    assert f"{tmp_path}/list.yaml is not valid YAML" in capsys.readouterr().err


def test_false_is_the_flag_that_says_no(tmp_path, monkeypatch):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    assert run(tmp_path, "encoders: {a: b}\nevaluations: {equivariance: {random-init: false, card: true}}") == 0
    assert calls[0][-2:] == ["--no-random-init", "--card"]


def test_a_damaged_record_means_once_more(tmp_path, monkeypatch):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    text = "encoders: {a: b}\nevaluations: {knn: {}}"
    assert run(tmp_path, text) == 0
    record = tmp_path / "out/a/knn/command.json"
    for number, content in enumerate((record.read_text()[:20], "[1]", "null", "\0" * 9), start=2):
        record.write_text(content)
        assert run(tmp_path, text) == 0 and run(tmp_path, text) == 0 and len(calls) == number


@pytest.mark.parametrize("damage", ["", '{"results": {"fu', "[]", "{}", '{"results": 3}', '{"rows": []}', b"\xff"])
def test_damaged_results_are_made_again(tmp_path, monkeypatch, capsys, damage):
    calls = stand_in_for_programs(monkeypatch, leave_results)
    text = "encoders: {a: b}\nevaluations: {knn: {}}"
    assert run(tmp_path, text) == 0
    results = tmp_path / "out/a/knn/results_eval_knn.json"
    results.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    with pytest.raises(ValueError, match=f"^{results} "):
        read_numbers(results.parent)
    assert run(tmp_path, text) == 0 and run(tmp_path, text) == 0 and len(calls) == 2
    assert "| a | 50 |" in capsys.readouterr().out


def test_a_log_that_is_no_text(tmp_path, monkeypatch, capsys):
    def fail(given: list[str]) -> int:
        sys.stdout.buffer.write(b"caf\xe9\n")
        return 3

    stand_in_for_programs(monkeypatch, fail)
    assert run(tmp_path, "encoders: {a: b}\nevaluations: {knn: {}}") == 2
    assert "a, knn: failed; caf\ufffd" in capsys.readouterr().out


def test_an_evaluation_that_leaves_nothing_failed(tmp_path, monkeypatch, capsys):
    stand_in_for_programs(monkeypatch, lambda given: 0)
    assert run(tmp_path, "encoders: {a: b}\nevaluations: {knn: {}}") == 2
    assert "a, knn: failed; it left no results" in capsys.readouterr().out


def test_words_of_submit_are_those_of_a_shell(tmp_path, monkeypatch, capsys):
    calls = stand_in_for_programs(monkeypatch, lambda given: 0)
    text = "encoders: {a: b}\nevaluations: {knn: {}}"
    assert run(tmp_path, text, "--submit", "--partition 'gpu") == 2
    assert "cannot be read: No closing quotation" in capsys.readouterr().err
    assert run(tmp_path, text, "--submit", "--partition 'gpu one'") == 0
    assert calls[0][:4] == ["submit", "knn", "--partition", "gpu one"]


@pytest.mark.cluster
def test_sigterm_ends_the_evaluation_under_way(tmp_path, capsys):
    """A real program, which would go on for long."""
    (tmp_path / "list.yaml").write_text(LIST.replace("num=30", "num=100000"))
    command = [sys.executable, "-m", "dinov2_eq.run.cli", *words(tmp_path)]
    log = tmp_path / "out/one/knn/log.txt"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_text()):
            time.sleep(0.2)
        process.terminate()
        assert "dinov2-eq: stopped by SIGTERM; the same command goes on" in process.stderr.read()
    assert process.returncode == 4
    with pytest.raises(ProcessLookupError):  # its group is empty
        os.killpg(process.pid, 0)
