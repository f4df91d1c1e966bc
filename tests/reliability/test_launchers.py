"""Runs that are started with torchrun and the console program, as a user types it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.reliability.faults import CHECKPOINTS, FAULT
from tests.reliability.runs import ARGUMENTS, Run

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def start(run: Run, *flags: str) -> subprocess.Popen:
    """Starts torchrun in the folder of the run; its output goes to the file of process 0."""
    environ = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", "2", *flags, "--no-python", BIN / "dinov2-eq"]
    with open(run.folder / "terminal.0.txt", "a") as terminal:
        return subprocess.Popen([*torchrun, *ARGUMENTS], cwd=run.folder, env=environ, stdout=terminal, stderr=terminal)


def test_torchrun_starts_a_killed_run_again_and_passes_sigterm_on(run, uninterrupted):
    run.set_fault("kill 1 4")
    torchrun = start(run, "--max-restarts", "1")
    await_fault(run)
    run.set_fault("wait 0 2")  # in the second step of the next start
    await_fault(run)
    torchrun.send_signal(signal.SIGTERM)
    assert torchrun.wait(180) == 1
    assert re.search(r"process 1 \(host .+, pid \d+\) has been silent", run.printed(0))
    assert f"resumed from {CHECKPOINTS}/2" in run.log(0)
    assert run.printed(0).count("dinov2-eq: stopped by SIGTERM after step 4, saved") == 2
    assert start(run).wait(360) == 0, run.printed(0)
    run.went_on(uninterrupted, 4)


def await_fault(run: Run) -> None:
    """Waits until the run has reached the step of its fault."""
    deadline = time.monotonic() + 240
    while (run.folder / FAULT).exists():
        assert time.monotonic() < deadline, run.printed(0)
        time.sleep(0.05)
