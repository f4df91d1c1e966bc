"""The command that runs inside a job of `dinov2-eq submit`."""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

import submitit
from submitit.core.utils import UncompletedJobError

from dinov2_eq.distributed.signals import StoppedBySignal
from dinov2_eq.exits import Stopped
from dinov2_eq.run.cli import COMMANDS, find_command
from dinov2_eq.run.outcome import exit_code

START_AGAIN = "--no-resume"


class Job:
    """A command line of `dinov2-eq` that submitit calls in each process of the job, and again after each requeue.

    It holds only strings, so that the pickle is small; everything else is in the run folder.

    Args:
        argv: `%j` in it becomes the number of the job.
        folder: the working directory, for relative paths in `argv`.
    """

    def __init__(self, argv: Sequence[str], folder: str) -> None:
        self.argv = list(argv)
        self.folder = folder

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Makes the job that follows a timeout or preemption: the same command, which resumes from the run folder."""
        return submitit.helpers.DelayedSubmission(Job(self._argv_to_resume(), self.folder))

    def __call__(self) -> None:
        """Runs the command in this process.

        Raises:
            SystemExit: with the exit code of a command that failed, so that SLURM shows it too.
        """
        logging.getLogger("submitit").propagate = False  # it prints by itself
        environment = submitit.JobEnvironment()
        # submitit's handler requeues the job. Training replaces it, saves, and stops with an exception.
        requeue = signal.getsignal(signal.SIGUSR2)
        os.chdir(self.folder)
        if environment.num_tasks > 1:
            # A scheduler may show a process all GPUs of its node, or only its own: `pick_device` handles both.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0  # `scontrol requeue` calls no checkpoint()
        argv = self._argv_to_resume() if restarted else self.argv
        name, rest = find_command([argument.replace("%j", environment.job_id) for argument in argv])
        try:
            importlib.import_module(COMMANDS[name][0]).main(rest)
        except StoppedBySignal as stop:
            code = exit_code(stop)
            if stop.signum != signal.SIGUSR2:
                sys.exit(code)  # the script that started this process does the rest, see `slurm_executor`
            # After `scontrol requeue`, SLURM sends SIGTERM to all processes, including scontrol, which inherits this.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            try:
                requeue(signal.SIGUSR2, None)  # ends the first process; the others return
            except UncompletedJobError as error:  # the job ran out of time too often
                sys.exit(f"dinov2-eq: {error}")
        except (Exception, Stopped) as error:
            sys.exit(exit_code(error))

    def _argv_to_resume(self) -> list[str]:
        return [argument for argument in self.argv if argument != START_AGAIN]
