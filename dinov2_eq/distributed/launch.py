"""Detects how this process was started, and joins its process group.

torchrun, srun and plain `python` are detected in this order, so that torchrun inside a SLURM job counts as torchrun.
"""

import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from dinov2_eq.distributed.heartbeat import Heartbeat
from dinov2_eq.distributed.meeting import Place, await_all, open_store

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_PORTS = 20000, 20000


class Launch(NamedTuple):
    """How this process was started, and its place among the others."""

    how: str  # torchrun, slurm or single
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0
    has_store: bool = False  # the launcher itself hosts the store through which the processes connect
    attempt: str = "0"  # how often the launcher has restarted these processes


# For a user who starts a single process in a shell that has a launcher's variables.
ADVICE = {
    "torchrun": "Start this command on every node. For a single process, unset RANK and WORLD_SIZE",
    "slurm": "srun must start this command once for each of its tasks. For a single process, unset "
    "SLURM_STEP_NUM_TASKS",
}


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's environment variables.

    Raises:
        ValueError: some of torchrun's variables are missing or are not numbers, or SLURM's node list cannot be read.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing, while other variables of torchrun are set; start with torchrun or "
                "srun, or unset them all for a single process"
            )
        world_size = _number(environ, "WORLD_SIZE", smallest=1)
        return Launch(
            "torchrun",
            _number(environ, "RANK", below=world_size),
            world_size,
            _number(environ, "LOCAL_RANK"),
            _number(environ, "LOCAL_WORLD_SIZE", smallest=1) if "LOCAL_WORLD_SIZE" in environ else world_size,
            environ["MASTER_ADDR"],
            _number(environ, "MASTER_PORT", smallest=1, below=2**16),
            # When torchrun restarts the processes, its store still holds addresses of processes that are gone.
            has_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            attempt=environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
        )
    # Only srun sets the number of tasks of the step; plain python in a batch script is a single process.
    if "SLURM_STEP_NUM_TASKS" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", smallest=1) > 1:
        node = int(environ["SLURM_NODEID"])
        seed = int(environ["SLURM_JOB_ID"]) + 7 * int(environ["SLURM_STEP_ID"])  # steps of a job may share a node
        return Launch(
            "slurm",
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            int(environ["SLURM_LOCALID"]),
            _tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])[node],
            environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
            _number(environ, "MASTER_PORT", smallest=1, below=2**16)
            if "MASTER_PORT" in environ
            else FIRST_PORT + seed % NUM_PORTS,
        )
    return Launch("single")


def _number(environ: Mapping[str, str], name: str, smallest: int = 0, below: int | None = None) -> int:
    text = environ[name]
    allowed = f"a whole number of at least {smallest}" + ("" if below is None else f" and below {below}")
    if not text.isdecimal() or int(text) < smallest or (below is not None and int(text) >= below):
        raise ValueError(f"{name}={text!r} in the environment must be {allowed}; unset it, or start with a launcher")
    return int(text)


def _tasks_of_nodes(description: str) -> list[int]:
    """Parses SLURM's tasks per node: "2(x3),1" -> [2, 2, 2, 1]."""
    tasks: list[int] = []
    for part in description.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks


def _first_host(node_list: str) -> str:
    """The first host of a list such as "node[001-003],other", expanded by SLURM's own program."""
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
        return hosts[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"scontrol cannot list the hosts of SLURM_STEP_NODELIST={node_list!r} ({error}); set MASTER_ADDR, "
            "MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK for each process, as torchrun does"
        ) from None


@contextmanager
def process_group(launch: Launch, device: torch.device, silence_limit_s: float) -> Iterator[None]:
    """Joins the process group for the duration of the context; does nothing in a single process.

    Collectives on CPU tensors use gloo, those on GPU tensors nccl. Meanwhile a heartbeat detects processes that died
    or were silent for `silence_limit_s` seconds, see `Heartbeat`.

    Raises:
        ValueError, OSError: the processes cannot connect; see `open_store` and `await_all`.
    """
    if launch.how == "single":
        yield
        return
    os.environ |= {
        "RANK": str(launch.rank),
        "WORLD_SIZE": str(launch.world_size),
        "LOCAL_RANK": str(launch.local_rank),
        "LOCAL_WORLD_SIZE": str(launch.local_world_size),
        "MASTER_ADDR": launch.master_addr,
        "MASTER_PORT": str(launch.master_port),
    }
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    place = Place(
        launch.rank, launch.world_size, launch.master_addr, launch.master_port, launch.has_store, ADVICE[launch.how]
    )
    store = dist.PrefixStore(launch.attempt, open_store(place))
    heartbeat = Heartbeat(
        launch.rank,
        launch.world_size,
        store,
        silence_limit_s,
        store_host="torchrun on the main host" if launch.has_store else None,
    )
    await_all(store, place)
    # Longer than the heartbeat's limit, because the heartbeat names the lost process and a timeout does not.
    timeout = timedelta(seconds=max(600.0, 4 * silence_limit_s))
    store.set_timeout(timeout)
    with heartbeat:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=timeout,
            device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
        )
        yield
        dist.barrier()
    dist.destroy_process_group()
