"""Jobs on a real SLURM with two nodes: whatever happens to them there, they end as if nothing had happened."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from dinov2_eq.run import submit
from dinov2_eq.train.train import do_train
from tests.helpers import TINY, tiny_config
from tests.processes import run_ranks
from tests.slurm.cluster import Cluster, run, why_not
from tests.slurm.slow import SIGN

REASON = why_not()
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(REASON is not None, reason=f"no SLURM: {REASON}")]

GUIDE = (Path(__file__).parents[2] / "docs" / "slurm.md").read_text()
ON_CPU = ["--gpus-per-node", "0", "--cpus-per-task", "1", "--mem-gb", "1", "--timeout", "60"]
# Only a run that is stopped leaves a checkpoint before its end.
LONG = ["optim.steps=24", "train.checkpoint_period_steps=1000", "train.num_workers=1"]
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
SLOW = "equivariance.transform=slow:Slow"  # se2, which is the default, with time for something to happen


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


@pytest.fixture(autouse=True)
def working_directory(tmp_path, monkeypatch) -> None:
    """Puts the programs of this environment on PATH, and the module `slow` on PYTHONPATH."""
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.path.relpath(Path(__file__).parent))


class Job:
    """A job in the queue, with the run folder and the log that it writes."""

    def __init__(self, number: str, folder: Path, log: Path) -> None:
        self.number, self.folder, self.log = number, folder, log

    def facts(self) -> dict[str, str]:
        """The fields that SLURM shows for the job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S+)", run("scontrol", "show", "job", self.number)))

    def restarts(self) -> int:
        return int(self.facts()["Restarts"])

    def step(self) -> int:
        """Number of finished steps."""
        metrics = self.folder / "training_metrics.jsonl"
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def log_lines(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait_until(self, condition: Callable[[], bool], seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            in_time = time.monotonic() < deadline and self.facts()["JobState"] not in ENDED
            assert in_time or condition(), f"{self.facts()}\n{self.log_lines()}"
            time.sleep(0.2)

    def goes_on(self, num_steps: int = 2) -> None:
        step = self.step()
        self.wait_until(lambda: self.step() >= step + num_steps)

    def is_queued_again_by(self, event: Callable[[], object]) -> None:
        """Lets the run make some steps, calls `event`, and waits until SLURM has restarted the job."""
        self.goes_on()
        restarts = self.restarts()
        event()
        self.wait_until(lambda: self.restarts() > restarts)

    def ends(self, state: str) -> str:
        """Waits until the job ends, which must be in `state`; returns its exit code as "code:signal"."""
        self.wait_until(lambda: self.facts()["JobState"] in ENDED)
        assert self.facts()["JobState"] == state, self.log_lines()
        return self.facts()["ExitCode"]


def submitted(*arguments: str) -> Job:
    """A training job of `dinov2-eq submit` in the folder `run`."""
    with redirect_stdout(StringIO()) as output:
        submit.main(["train", "--config-file", "debug", "--output-dir", "run", *ON_CPU, *TINY, *arguments])
    (number,) = re.findall(r"job (\d+) is queued", output.getvalue())
    (log,) = re.findall(r"logs +(\S+),", output.getvalue())
    return Job(number, Path("run"), Path(log.replace("*", "0")))


def teacher(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of the teacher at the end of a run."""
    (path,) = folder.glob("eval/training_*/teacher_checkpoint.pth")
    return torch.load(path)["teacher"]


def train(folder: str, overrides: list[str]) -> None:
    do_train(tiny_config(*overrides), Path(folder))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Callable[..., dict[str, torch.Tensor]]:
    """The teacher of an undisturbed run with the given number of processes."""

    @cache
    def teacher_of(world_size: int, per_node: int, *overrides: str) -> dict[str, torch.Tensor]:
        folder = tmp_path_factory.mktemp("undisturbed")
        run_ranks(train, world_size, str(folder), overrides, per_node=per_node)
        return teacher(folder)

    return teacher_of


def require_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_two_nodes_go_on_after_requeue_and_time_limit(undisturbed):
    """SLURM sends SIGTERM for the one and, ahead of it, SIGUSR2 for the other."""
    overrides = [*LONG, "optim.steps=44"]  # SLURM looks at time limits every 30 seconds
    SIGN.touch()
    job = submitted("--nodes", "2", *overrides, SLOW)
    job.is_queued_again_by(lambda: run("scontrol", "requeue", job.number))
    job.is_queued_again_by(lambda: run("scontrol", "update", f"JobId={job.number}", "TimeLimit=1"))
    SIGN.unlink()
    run("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.ends("COMPLETED")
    stops = re.findall(r"stopped by (\w+) after step (\d+), saved", job.log_lines())
    assert [signal for signal, _ in stops] == ["SIGTERM", "SIGUSR2"]
    assert re.findall(r"resumed from run/checkpoints/(\d+)", job.log_lines()) == [step for _, step in stops]
    require_same(teacher(job.folder), undisturbed(2, 1, *overrides))


def test_the_script_of_the_guide_goes_on_after_usr2_and_the_loss_of_a_node(cluster, undisturbed):
    """srun without submitit: the script queues itself again, SLURM does so when a node is lost."""
    script = re.search(r"```bash\n(#!.*?)```", GUIDE, re.DOTALL)[1]
    Path("train.sh").write_text(script.replace("vits16_eq", "debug"))
    assert re.search(r"^sbatch .* train.sh \S+=", GUIDE, re.MULTILINE)
    on_cpu = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1", "--mem=1G"]
    SIGN.touch()
    number = run("sbatch", "--parsable", *on_cpu, "train.sh", *TINY, *LONG, SLOW).strip()
    job = Job(number, Path("runs/mine"), Path(f"train-{number}.log"))
    job.is_queued_again_by(lambda: run("scancel", "--signal=USR2", number))
    job.is_queued_again_by(lambda: cluster.kill_node("node2"))
    assert "process 1 (host node2" in job.log_lines()
    SIGN.unlink()
    cluster.start_node("node2")
    assert job.ends("COMPLETED") == "0:0"
    require_same(teacher(job.folder), undisturbed(2, 1, *LONG))


def test_two_processes_on_each_of_two_nodes_go_on_after_an_eviction(undisturbed):
    overrides = [*LONG, "optim.steps=12", "fsdp.strategy=hybrid"]
    SIGN.touch()
    job = submitted("--nodes", "2", "--tasks-per-node", "2", *overrides, SLOW)
    evict = ["sbatch", "--partition=high", "--nodes=2", "--mem=0", "--output=/dev/null", "--wrap=true"]
    job.is_queued_again_by(lambda: run(*evict))
    SIGN.unlink()
    job.ends("COMPLETED")
    assert "this job is preempted" in job.log_lines() and "resumed from" in job.log_lines()
    require_same(teacher(job.folder), undisturbed(4, 2, *overrides))


def test_the_interactive_commands_of_the_guide():
    allocate, rest = re.search(r"```bash\n(salloc .*?)\n(.*?)```", GUIDE, re.DOTALL).groups()
    for on_gpus, on_cpu in {
        "=8": "=1",
        "--gpus-per-node=1": "--gpus-per-node=0",
        "=10": "=1",
        "--mem=0": "--mem=1G",
    }.items():
        allocate, rest = allocate.replace(on_gpus, on_cpu), rest.replace(on_gpus, on_cpu)
    rest = rest.replace("vits16_eq", "debug").replace("runs/try", f"runs/try {' '.join(TINY)}")
    srun, torchrun = re.split(r"\n(?=first=)", rest)
    for commands in (srun, torchrun):
        run(*allocate.split(), "bash", "-ec", commands)
        assert sorted(path.name for path in Path("runs/try/logs").iterdir()) == ["log.0.txt", "log.1.txt"]
        assert teacher(Path("runs/try"))
        Path("runs/try").rename(f"runs/{len(commands)}")


def test_signals_with_no_resume_and_a_number_in_the_path(undisturbed):
    """SLURM does not queue again what ends before it is killed, so the job does; a run is set aside only once."""
    SIGN.touch()
    job = submitted("--output-dir", "runs/%j", *LONG, SLOW, "--no-resume")
    job.folder = Path("runs", job.number)
    job.is_queued_again_by(lambda: run("scancel", "--signal=USR2", job.number))
    # What the processes get from a cluster without preempt_send_user_signal.
    job.is_queued_again_by(lambda: run("scancel", "--signal=TERM", job.number))
    SIGN.unlink()
    job.ends("COMPLETED")
    assert re.findall(r"stopped by (\w+)", job.log_lines()) == ["SIGUSR2", "SIGTERM"]
    assert not list(job.folder.glob("previous-*"))
    require_same(teacher(job.folder), undisturbed(1, 1, *LONG))


def test_failures_are_failures():
    """Bad data gives exit code 2 and one line, too many timeouts 1; a cancelled job is saved and stays away."""
    Path("images").mkdir()
    Image.new("RGB", (32, 32)).save("images/0.png")
    SIGN.touch()
    bad = submitted("--slurm", "hold", "train.dataset_path=Folder:root=images")
    Path("images/0.png").unlink()
    run("scontrol", "release", bad.number)
    assert bad.ends("FAILED") == "2:0"
    assert "dinov2-eq: " in bad.log_lines() and "images" in bad.log_lines() and "Traceback" not in bad.log_lines()

    late = submitted("--timeout", "5", "--max-requeues", "0", *LONG, SLOW)
    late.goes_on()
    run("scancel", "--signal=USR2", late.number)
    assert late.ends("FAILED") == "1:0"
    assert "timed-out too many times" in late.log_lines() and "Traceback" not in late.log_lines()

    cancelled = submitted(*LONG, SLOW)  # goes on where the other one stopped
    cancelled.goes_on()
    run("scancel", cancelled.number)
    cancelled.ends("CANCELLED")
    assert "stopped by SIGTERM after step" in cancelled.log_lines()


def test_what_slurm_refuses_leaves_nothing():
    with pytest.raises(ValueError, match=r"SLURM refused the job: .*invalid partition"):
        submitted("--partition", "nowhere")
    assert list(Path("run/submitit").iterdir()) == []
