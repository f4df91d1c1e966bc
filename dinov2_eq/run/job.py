"""What runs inside a job of `dinov2-eq submit`."""

import importlib
import logging
import os
import signal
import sys
from collections.abc import Sequence

import submitit
from submitit.core.utils import UncompletedJobError

from dinov2_eq.distributed.signals import StoppedBySignal
from dinov2_eq.run.cli import COMMANDS, find_command
from dinov2_eq.run.outcome import exit_code

START_AGAIN = "--no-resume"


class Job:
    """A command line of `dinov2-eq`; submitit calls it in each process of the job, and again after each requeue.

    It holds strings only: what is pickled is small, and everything else is found in the run folder.
    """

    def __init__(self, argv: Sequence[str], folder: str) -> None:
        """`%j` in `argv` becomes the number of the job; relative paths in it start at `folder`."""
        self.argv = list(argv)
        self.folder = folder

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What follows a timeout or preemption: the same command, which goes on from the run folder."""
        return submitit.helpers.DelayedSubmission(Job(self._argv_to_go_on(), self.folder))

    def __call__(self) -> None:
        """Runs the command in this process.

        Raises:
            SystemExit: with the exit code of a command that failed, so that SLURM says so too.
        """
        logging.getLogger("submitit").propagate = False  # it prints by itself
        environment = submitit.JobEnvironment()
        # Requeues the job, from its first process. Training puts its own handler in the place of this one, saves, and
        # stops with an exception.
        requeue = signal.getsignal(signal.SIGUSR2)
        os.chdir(self.folder)
        if environment.num_tasks > 1:
            # A scheduler may show a process all GPUs of its node, or only its own: `pick_device` can tell.
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        restarted = int(os.environ.get("SLURM_RESTART_COUNT", 0)) > 0  # `scontrol requeue` calls no checkpoint()
        argv = self._argv_to_go_on() if restarted else self.argv
        name, rest = find_command([argument.replace("%j", environment.job_id) for argument in argv])
        try:
            importlib.import_module(COMMANDS[name][0]).main(rest)
        except StoppedBySignal as stop:
            code = exit_code(stop)
            # SIGTERM needs no more: SLURM restarts the job by itself, or somebody has cancelled it.
            if stop.signum == signal.SIGUSR2 and _requeued(requeue):
                return
            sys.exit(code)
        except Exception as error:
            sys.exit(exit_code(error))

    def _argv_to_go_on(self) -> list[str]:
        return [argument for argument in self.argv if argument != START_AGAIN]


def _requeued(handler: signal.Handlers) -> bool:
    """Calls submitit's handler, which ends the first process, and in the others leaves it to that one.

    Returns:
        False when the job has run out of time too often.
    """
    try:
        handler(signal.SIGUSR2, None)
    except UncompletedJobError as error:
        print(f"dinov2-eq: {error}", file=sys.stderr)
        return False
    return True
