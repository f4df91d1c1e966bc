"""Runs `demo.sh` with a program in place of dinov2-eq that only records its arguments."""

import os
import subprocess
from pathlib import Path

import pytest

from dinov2_eq.eval import equivariance, knn

SCRIPT = Path(__file__).parents[2] / "tools/demo.sh"


def demo(tmp_path, failing="nothing"):
    program = tmp_path / "dinov2-eq"
    program.write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/calls"\ncase "$*" in {failing}) exit 3 ;; esac\n')
    program.chmod(0o755)
    environment = {**os.environ, "BIN": str(tmp_path)}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment, capture_output=True, text=True, timeout=60)
    return done, [line.split() for line in (tmp_path / "calls").read_text().splitlines()]


def test_both_runs_are_trained_probed_and_shown(tmp_path):
    done, calls = demo(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{tmp_path}/out/report.html"
    assert [call[0] for call in calls] == ["train"] * 2 + ["eval"] * 4 + ["report"]
    for program, name in ((knn, "knn"), (equivariance, "equivariance")):
        flags = [program.build_parser().parse_args(call[2:]) for call in calls if call[:2] == ["eval", name]]
        assert {Path(given.pretrained_weights).name for given in flags} == {"task", "control"}


@pytest.mark.parametrize("run", ["task", "control"])
@pytest.mark.parametrize("command", ["train", "knn", "equivariance"])
def test_one_failure_ends_it(tmp_path, command, run):
    done, calls = demo(tmp_path, failing=f"*{command}\\ --*/{run}*")
    assert done.returncode == 1 and f"'{command} {tmp_path}/out/{run}' failed" in done.stderr
    assert ["report"] not in [call[:1] for call in calls]
