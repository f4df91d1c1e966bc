"""Real processes joined by gloo, for tests of what several processes do together."""

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.queues import Queue
from queue import Empty
from typing import Any

# A server that has imported torch once; each process is forked from it, in milliseconds.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["dinov2_eq.train.train"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(
    function: Callable, world_size: int, *args: Any, per_node: int | None = None
) -> tuple[list[multiprocessing.Process], Queue]:
    """Starts `function(*args)` in processes with torchrun's variables; they put (rank, result, traceback) in the queue.

    Args:
        function: found by its name, so defined at the top of a module.
        per_node: pretend that so many processes share a node; None: all do.
    """
    port, queue = free_port(), _CONTEXT.Queue()
    local = per_node or world_size
    processes = []
    for rank in range(world_size):
        variables = {
            **{"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local},
            **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1},
        }
        arguments = ({name: str(value) for name, value in variables.items()}, queue, function, args)
        processes.append(_CONTEXT.Process(target=_run, args=arguments, daemon=False))
    for process in processes:
        process.start()
    return processes, queue


def run_ranks(
    function: Callable, world_size: int, *args: Any, per_node: int | None = None, timeout_s: float = 120
) -> list[Any]:
    """Results of `function(*args)`, ordered by rank; see `start_ranks`.

    Raises:
        RuntimeError: a process raised, with its traceback, or gave no answer in time.
    """
    processes, queue = start_ranks(function, world_size, *args, per_node=per_node)
    answers: dict[int, tuple[Any, str]] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(answers) < world_size:
            silent = {rank: process.exitcode for rank, process in enumerate(processes) if rank not in answers}
            ended = all(code is not None for code in silent.values())
            try:
                rank, result, trace = queue.get(timeout=1)
                answers[rank] = result, trace
            except Empty:
                if ended or time.monotonic() > deadline:
                    traces = [f"process {rank}:\n{trace}" for rank, (_, trace) in answers.items() if trace]
                    raise RuntimeError("\n".join([f"no answer, exit codes by rank: {silent}", *traces])) from None
    finally:
        for process in processes:
            process.join(timeout=5)
            process.kill()
    for rank, (_, trace) in sorted(answers.items()):
        if trace:
            raise RuntimeError(f"process {rank} failed:\n{trace}")
    return [result for _, (result, _) in sorted(answers.items())]


def _run(variables: dict[str, str], queue: Queue, function: Callable, args: tuple[Any, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # for data loading, as in a process that a user starts
    os.environ.update(variables)
    rank = int(variables["RANK"])
    try:
        queue.put((rank, function(*args), ""))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise
