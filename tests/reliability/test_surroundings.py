"""Faults of the surroundings of a run: another run, little shared memory, a used port, a lost terminal."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinov2_eq.run import cli
from tests.helpers import TINY
from tests.processes import free_port, start_ranks
from tests.reliability.faults import FAULT, RUN
from tests.reliability.runs import exit_codes

pytestmark = pytest.mark.cluster
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def test_a_second_run_in_the_same_folder(run, uninterrupted):
    first = run.start(fault="wait 0 3")
    deadline = time.monotonic() + 120
    while (run.folder / FAULT).exists():
        assert time.monotonic() < deadline, run.printed(0)
        time.sleep(0.05)
    assert run.train() == [2, 2]
    owner = rf"{RUN} is in use by process {first[0].pid} on \S+, since .*choose another --output-dir"
    for rank in (0, 1):
        assert re.search(f"dinov2-eq: {owner}", run.printed(rank))
    os.kill(first[0].pid, signal.SIGTERM)
    assert exit_codes(first) == [4, 4]
    run.goes_on(uninterrupted, 3)


def forget_the_launcher() -> None:
    for name in LAUNCHERS:
        os.environ.pop(name, None)


def train_with_variables(folder: Path, variables: dict[str, str]) -> None:
    """Starts `dinov2-eq train` with only these variables of launchers, and with its terminal in a file."""
    forget_the_launcher()
    os.environ.update(variables)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.default_int_handler if signum == signal.SIGINT else signal.SIG_DFL)
    with open(folder / "terminal.txt", "w") as terminal:
        os.dup2(terminal.fileno(), sys.stderr.fileno())
    train(folder)


def train(folder: Path) -> None:
    code = cli.main(["train", "--config-file", "debug", "--output-dir", str(folder / RUN), *TINY])
    os._exit(code)  # Python itself would still write to the terminal


def test_little_shared_memory(tmp_path):
    own_mounts = ["unshare", "--mount", *(["--map-root-user"] if os.getuid() else [])]
    if shutil.which("unshare") is None or subprocess.run([*own_mounts, "true"]).returncode:
        pytest.skip("no mounts of its own for a process here")
    small = 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"'
    program = [sys.executable, "-m", "dinov2_eq.run.cli", "train", "--config-file", "debug", "--output-dir", RUN, *TINY]
    overrides = ["train.num_workers=2", "train.batch_size_per_gpu=16", "crops.global_crops_size=64"]
    done = subprocess.run(
        [*own_mounts, "sh", "-c", small, "sh", *program, *overrides],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    expected = "dinov2-eq: /dev/shm, through which data-loading processes send their batches, is too small"
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def train_with_a_lost_terminal(folder: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(writing, stream.fileno())
    forget_the_launcher()
    train(folder)


def test_a_lost_terminal(tmp_path):
    processes, _ = start_ranks(train_with_a_lost_terminal, 1, tmp_path)
    assert exit_codes(processes) == [0]
    assert "finished: 6 steps" in (tmp_path / RUN / "logs" / "log.0.txt").read_text().splitlines()[-1]
    assert "6" in os.listdir(tmp_path / RUN / "checkpoints")


def test_a_port_that_is_taken(tmp_path):
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
        processes, _ = start_ranks(train_with_variables, 1, tmp_path, variables | {"MASTER_PORT": str(port)})
        assert exit_codes(processes) == [2]
    assert f"dinov2-eq: Port {port} of MASTER_PORT is in use on this host" in (tmp_path / "terminal.txt").read_text()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 4)])
def test_a_single_process_in_a_shell_of_srun(tmp_path, signum, code):
    """The process waits for the other task of the shell, says so at once, and can be stopped."""
    variables = {
        **{"SLURM_JOB_ID": "79", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        **{"SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "localhost"},
        **{"SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())},
    }
    (process,), _ = start_ranks(train_with_variables, 1, tmp_path, variables)
    told = tmp_path / "terminal.txt"
    deadline = time.monotonic() + 60
    while not (told.exists() and "waiting for 1 of 2 processes, rank 1 (" in told.read_text()):
        assert time.monotonic() < deadline and process.is_alive(), told.read_text()
        time.sleep(0.1)
    os.kill(process.pid, signum)
    assert exit_codes([process], timeout_s=30) == [code]
    assert "For a single process, unset SLURM_STEP_NUM_TASKS" in told.read_text()
