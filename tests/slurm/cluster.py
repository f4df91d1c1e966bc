"""A real SLURM with two nodes on this one host, for tests; see README.md beside this file."""

import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "unshare")
NODES = ("node1", "node2")
SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthType=auth/munge
# A requeued job may start again cred_expire seconds later (at least 5; default 120).
AuthInfo=socket={folder}/munge.socket,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
# Processes that do not end after SIGTERM are killed so many seconds later (default 30).
KillWait=20
# A job of the partition "high" takes the nodes of one in "low", which gets its --signal and GraceTime first.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
FirstJobId={first_job}
PropagateResourceLimits=NONE
MailProg=/bin/true
# A node that does not answer for so many seconds is down (default 300), and comes back when it does.
SlurmdTimeout=5
ReturnToService=2
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
# More than the host has, so that what a cluster's users ask for is granted; nothing holds a job to it.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=node1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=96 RealMemory=65536 Gres=gpu:8
NodeName=node2 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=96 RealMemory=65536 Gres=gpu:8
PartitionName=low Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
"""
# A node has a host name of its own, which its jobs can resolve.
START_NODE = 'hostname "$1" && mount --bind "$2/hosts" /etc/hosts && exec slurmd -N "$1"'


def why_not() -> str | None:
    """What this host lacks for a cluster."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        return f"{', '.join(missing)} not installed; .ci/run names Debian's packages"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        return "no UTS and mount namespaces here"
    return None


class Cluster:
    """A context manager; inside it, this process and its children talk to this SLURM."""

    def __enter__(self) -> "Cluster":
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)  # munged wants its socket where all can reach it
        self._before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if (self.folder / "slurmctld.pid").exists():
                run("scancel", "--user", "root")
                self._wait_until(lambda: not run("squeue", "--noheader"), 40)
        finally:
            pids = [int(pid_file.read_text()) for pid_file in self.folder.glob("*.pid")]
            for pid in pids:
                kill(pid, signal.SIGTERM)
            self._wait_until(lambda: not any(namespace(pid) for pid in pids), 30)
            if self._before is None:
                del os.environ["SLURM_CONF"]
            else:
                os.environ["SLURM_CONF"] = self._before
            shutil.rmtree(self.folder, ignore_errors=True)

    def _start(self) -> None:
        for name in ("state", *NODES):
            (self.folder / name).mkdir()
        values = {"host": socket.gethostname(), "ports": free_ports(3), "first_job": random.randrange(1, 60_000_000)}
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(folder=self.folder, **values))
        for number in range(8):  # a GPU must be a device: aliases of /dev/null
            os.mknod(self.folder / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-7]\n")
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n127.0.0.1 node1 node2\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(random.SystemRandom().randbytes(1024))
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munged.pid", "log-file": "munged.log"}
        run(
            "munged",
            *(f"--{flag}={self.folder / name}" for flag, name in files.items()),
            f"--seed-file={self.folder}/seed",
        )
        run("slurmctld")
        for node in NODES:
            self.start_node(node)
        self._wait_until(lambda: run("sinfo", "-h", "-N", "-p", "low", "-o", "%T").split() == ["idle"] * 2, 30)

    def start_node(self, node: str) -> None:
        run("unshare", "--uts", "--mount", "sh", "-c", START_NODE, "sh", node, str(self.folder))

    def kill_node(self, node: str) -> None:
        """Ends all processes on the node at once: those that share its host name."""
        host = namespace(int((self.folder / f"slurmd-{node}.pid").read_text()))
        assert host not in (None, namespace(os.getpid())), f"{node} does not run"
        for pid in [int(path.name) for path in Path("/proc").glob("[0-9]*")]:
            if namespace(pid) == host:
                kill(pid, signal.SIGKILL)

    def _wait_until(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = "\n".join(f"{log}\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise TimeoutError(f"the cluster in {self.folder} does not do as it should\n{logs}")
            time.sleep(0.2)


def namespace(pid: int) -> str | None:
    """The host-name namespace of a process; None when it has ended."""
    try:
        return os.readlink(f"/proc/{pid}/ns/uts")
    except OSError:
        return None


def kill(pid: int, signum: int) -> None:
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(pid, signum)


def run(*command: str) -> str:
    """What a command prints; raises CalledProcessError where it fails."""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with Cluster():
        print(f"a shell with two nodes; 'exit' ends the cluster in {os.environ['SLURM_CONF']}")
        subprocess.run([os.environ.get("SHELL", "bash")])
