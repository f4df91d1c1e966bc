"""Hands jobs of `dinov2-eq submit` to submitit, for SLURM or for processes on this host."""

import importlib
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from dinov2_eq.exits import STOPPED
from dinov2_eq.run.job import Job

PACKAGES = ("dinov2_eq", "dinov2_eq.tools", "dinov2_eq.configs")


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which can also write its script on hosts without SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 1

    def script(self) -> str:
        return self._make_submission_file_text(self._submitit_command_str, uid="")


def slurm_executor(folder: Path, max_num_timeout: int, parameters: dict[str, Any]) -> SlurmExecutor:
    """Makes an executor whose jobs import the copy of the code in `folder`.

    Args:
        max_num_timeout: how often a job may run out of time and be requeued.
        parameters: parameters of `submitit.SlurmExecutor`, named as in sbatch.
    """
    executor = SlurmExecutor(folder, max_num_timeout=max_num_timeout)
    executor.update_parameters(
        **parameters,
        stderr_to_stdout=True,
        # Python imports from its working directory first, which must therefore not be a checkout.
        setup=[f"export PYTHONPATH={shlex.quote(module_path(folder))}", f"cd {shlex.quote(str(folder))}"],
        # submitit handles SIGUSR2. A run stopped by SIGTERM ends with code STOPPED. After an eviction, SLURM does not
        # requeue a job that ended before it was killed, so the script does. After a cancellation, the script is dead.
        teardown=["code=$?", f'[ $code -eq {STOPPED} ] && scontrol requeue "$SLURM_JOB_ID"', "exit $code"],
        # Since SLURM 22.05, srun does not inherit this number from sbatch.
        srun_args=[f"--cpus-per-task={parameters['cpus_per_task']}"],
    )
    return executor


def queue_on_slurm(executor: SlurmExecutor, job: Job) -> str:
    """Queues the job and returns a message for the user; raises ValueError if SLURM refuses the job."""
    with clean_environment():
        try:
            queued = executor.submit(job)
        except FailedJobError as error:
            raise ValueError(f"SLURM refused the job: {error}") from None
    number = queued.job_id
    return (
        f"job {number} is queued\n"
        f"logs    {queued.paths.folder}/{number}_*_log.out, one per process\n"
        f"watch   squeue --jobs {number}\n"
        f"cancel  scancel {number}"
    )


def start_on_this_host(folder: Path, max_num_timeout: int, parameters: dict[str, Any], job: Job) -> str:
    """Starts processes that outlive this one, and returns a message for the user.

    Args:
        parameters: parameters of `submitit.LocalExecutor`.
    """
    executor = submitit.LocalExecutor(folder, max_num_timeout=max_num_timeout)
    executor.update_parameters(**parameters, stderr_to_stdout=True)
    with clean_environment(PYTHONPATH=module_path(folder)), working_in(folder):
        started = executor.submit(job)
    number = started.job_id
    return (
        f"job {number} has started\n"
        f"logs    {started.paths.folder}/{number}_*_log.out, one per process\n"
        f"watch   tail -F {started.paths.folder}/{number}_0_log.out\n"
        f"cancel  kill {number}"
    )


def copy_code(folder: Path) -> None:
    """Copies this package to `folder`, laid out as installed, so that later changes do not affect a queued job."""
    for package in PACKAGES:
        source = importlib.import_module(package).__path__[0]
        target = code_in(folder).joinpath(*package.split("."))
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)


def code_in(folder: Path) -> Path:
    """Where `copy_code` puts the package."""
    return folder / "code"


def module_path(folder: Path) -> str:
    """PYTHONPATH for the job: the copy of the code, then the PYTHONPATH of this process, as absolute paths."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(code_in(folder)), *(os.path.abspath(path) for path in own if path)])


@contextmanager
def clean_environment(**variables: str) -> Iterator[None]:
    """Hides the variables of a job that this process may run in, except SLURM_CONF, and adds `variables`."""
    if "SLURM_CONF" in os.environ:
        variables["SLURM_CONF"] = os.environ["SLURM_CONF"]
    with submitit.helpers.clean_env(), submitit.helpers.environment_variables(**variables):
        yield


@contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Changes the working directory for the duration of the context."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
