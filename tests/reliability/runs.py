"""Training runs of two processes, as a user starts them and as faults end them."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing import Process
from pathlib import Path

import torch

from dinov2_eq.files import file_sha256
from dinov2_eq.run import cli
from tests.helpers import TINY
from tests.processes import start_ranks
from tests.reliability.faults import CHECKPOINTS, FAULT, PERIOD_STEPS, RUN

STEPS = 6
ARGUMENTS = [
    *("train", "--config-file", "debug", "--output-dir", str(RUN), *TINY),
    *(f"optim.steps={STEPS}", f"train.checkpoint_period_steps={PERIOD_STEPS}", "train.keep_checkpoints=9"),
    *("train.batch_size_per_gpu=2", "train.lost_rank_timeout_s=20", "train.device=cpu"),
    # Which counts its calls: with g on the second view, one in each step.
    *("equivariance.transform=tests.reliability.faults:Faulty", "equivariance.view=second"),
]


class Run:
    """The run folder `run` in `folder`, and what its processes sent to their terminals."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *overrides: str, fault: str = "") -> list[Process]:
        """`dinov2-eq train` in two processes, with torchrun's variables; `fault` as in `Faulty`."""
        self.set_fault(fault)
        processes, self._queue = start_ranks(_command, 2, self.folder, [*ARGUMENTS, *overrides])  # they read the queue
        return processes

    def set_fault(self, fault: str) -> None:
        if fault:
            (self.folder / FAULT).write_text(fault)

    def train(self, *overrides: str, fault: str = "") -> list[int]:
        """Exit codes of the two processes."""
        return exit_codes(self.start(*overrides, fault=fault))

    def printed(self, rank: int) -> str:
        """By all starts; the terminal of process 0 shows its log too."""
        return (self.folder / f"terminal.{rank}.txt").read_text()

    def log(self, rank: int) -> str:
        return (self.folder / RUN / "logs" / f"log.{rank}.txt").read_text()

    @property
    def checkpoints(self) -> Path:
        return self.folder / CHECKPOINTS

    def names_of_checkpoints(self) -> list[str]:
        return sorted(path.name for path in self.checkpoints.iterdir())

    def copied_from(self, other: "Run", step: int) -> None:
        """As if the other run had been interrupted after the checkpoint of `step`."""
        shutil.copytree(other.folder / RUN, self.folder / RUN)
        shutil.rmtree(self.folder / RUN / "eval")
        for path in self.checkpoints.iterdir():
            if int(path.name) > step:
                shutil.rmtree(path)

    def stopped_after(self, uninterrupted: "Run", step: int) -> None:
        """Its newest checkpoint is that of `step`, whole, and holds bit for bit what the uninterrupted run's holds.

        That a run goes on from there as if nothing had happened is shown by `goes_on`, after other faults.
        """
        assert self.names_of_checkpoints()[-1] == str(step)
        ours, theirs = (run.checkpoints / str(step) for run in (self, uninterrupted))
        manifest = json.loads((ours / "manifest.json").read_text())
        assert manifest == {name: file_sha256(ours / name) for name in manifest}
        written = [name for name in manifest if name.endswith(".distcp")]
        assert len(written) == 2 and all(file_sha256(theirs / name) == manifest[name] for name in written)

    def goes_on(self, uninterrupted: "Run", step: int, *overrides: str) -> None:
        """The same command goes on after `step` finished steps, and ends where the uninterrupted run ends."""
        assert self.train(*overrides) == [0, 0], self.printed(0)
        self.went_on(uninterrupted, step)

    def went_on(self, uninterrupted: "Run", step: int) -> None:
        """Bit for bit, and with every step in its metrics once."""
        assert re.findall(rf"resumed from {CHECKPOINTS}/(\d+)", self.log(0))[-1:] == [str(step)]
        assert self._steps() == uninterrupted._steps() == list(range(1, STEPS + 1))
        torch.testing.assert_close(self._teacher(), uninterrupted._teacher(), rtol=0, atol=0)

    def _steps(self) -> list[int]:
        lines = (self.folder / RUN / "training_metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines]

    def _teacher(self) -> dict[str, torch.Tensor]:
        path = self.folder / RUN / "eval" / f"training_{STEPS}" / "teacher_checkpoint.pth"
        return torch.load(path, weights_only=True)["teacher"]


def _command(folder: Path, argv: Sequence[str]) -> None:
    os.chdir(folder)
    with open(f"terminal.{os.environ['RANK']}.txt", "a", buffering=1) as terminal:
        os.dup2(terminal.fileno(), sys.stderr.fileno())
        sys.exit(cli.main(argv))


def exit_codes(processes: Sequence[Process], timeout_s: float = 180) -> list[int]:
    """Processes that do not end in time are killed."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.exitcode is None]
    for rank in late:
        processes[rank].kill()
    assert not late, f"processes {late} have not ended after {timeout_s} s"
    return [process.exitcode for process in processes]
