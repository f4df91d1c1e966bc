"""How this process was started, and the process group that follows from it.

torchrun, srun and a plain `python` reach the same code; detected in this order, so that torchrun inside a SLURM job is
torchrun.
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

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
FIRST_PORT, NUM_PORTS = 20000, 20000


class Launch(NamedTuple):
    how: str  # torchrun, slurm or single
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str = ""
    master_port: int = 0


def find_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """Reads the launcher's variables.

    Raises:
        ValueError: torchrun's variables are there in part, or SLURM's node list cannot be read.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [name for name in TORCHRUN_VARIABLES if name not in environ]
        if missing:
            raise ValueError(
                f"{' and '.join(missing)} missing beside the other variables of torchrun; start with torchrun "
                "or srun, or unset them all for a single process"
            )
        world_size = int(environ["WORLD_SIZE"])
        return Launch(
            "torchrun",
            int(environ["RANK"]),
            world_size,
            int(environ["LOCAL_RANK"]),
            int(environ["LOCAL_WORLD_SIZE"]) if "LOCAL_WORLD_SIZE" in environ else world_size,
            environ["MASTER_ADDR"],
            int(environ["MASTER_PORT"]),
        )
    # Only srun sets the step's number of tasks; a plain python in a batch script is a single process.
    if "SLURM_STEP_NUM_TASKS" in environ and int(environ["SLURM_STEP_NUM_TASKS"]) > 1:
        node = int(environ["SLURM_NODEID"])
        seed = int(environ["SLURM_JOB_ID"]) + 7 * int(environ["SLURM_STEP_ID"])  # steps of a job may share a node
        return Launch(
            "slurm",
            int(environ["SLURM_PROCID"]),
            int(environ["SLURM_STEP_NUM_TASKS"]),
            int(environ["SLURM_LOCALID"]),
            _tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])[node],
            _first_host(environ["SLURM_STEP_NODELIST"]),
            FIRST_PORT + seed % NUM_PORTS,
        )
    return Launch("single")


def _tasks_of_nodes(description: str) -> list[int]:
    """ "2(x3),1" -> [2, 2, 2, 1]"""
    tasks: list[int] = []
    for part in description.split(","):
        number, _, times = part.rstrip(")").partition("(x")
        tasks += [int(number)] * int(times or 1)
    return tasks


def _first_host(node_list: str) -> str:
    """The first of "node[001-003],other": SLURM's own program knows every form of such lists."""
    try:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True, timeout=60
        ).stdout.split()
        return hosts[0]
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        raise ValueError(
            f"scontrol cannot tell the hosts of SLURM_STEP_NODELIST={node_list!r} ({error}); set MASTER_ADDR, "
            "MASTER_PORT, RANK, WORLD_SIZE and LOCAL_RANK for each process, as torchrun does"
        ) from None


@contextmanager
def process_group(launch: Launch, device: torch.device, silence_limit_s: float) -> Iterator[None]:
    """Joins this process to the others for as long as the context lasts; nothing happens in a single process.

    Collectives on CPU tensors go through gloo, those on GPU tensors through nccl. While it lasts, a heartbeat tells a
    process that died, or stopped for `silence_limit_s` seconds, from one that computes: see `Heartbeat`.
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
    # Longer than the heartbeat's patience: the heartbeat names the process, a collective that times out does not.
    timeout = timedelta(seconds=max(600.0, 4 * silence_limit_s))
    store, rank, world_size = next(dist.rendezvous("env://", timeout=timeout))
    # torchrun keeps its store when it starts the processes again, with addresses of processes that are gone.
    store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=torch.device("cuda", torch.cuda.current_device()) if on_gpu else None,
    )
    by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store_host = "torchrun on the main host" if by_torchrun else None
    with Heartbeat(rank, world_size, store, silence_limit_s, store_host):
        yield
        dist.barrier()
    dist.destroy_process_group()
