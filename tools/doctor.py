"""Checks a machine, and a config on it, before a run: each line says ok, or what to fix.

Under torchrun or srun every process checks its own machine, and together they measure the connections between them.
"""

import argparse
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from packaging.requirements import Requirement
from torch import Tensor

from dinov2_eq.config.load import load_config
from dinov2_eq.config.schema import Config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.distributed import gather_objects, get_rank, get_world_size, pick_device
from dinov2_eq.distributed.launch import Launch, find_launch, process_group
from dinov2_eq.distributed.signals import stops_raise
from dinov2_eq.files import check_writable
from dinov2_eq.fsdp import why_compile_fails
from dinov2_eq.layers.attention import choose_backend
from dinov2_eq.train.build import build_arch, build_train_loader, uses_half_precision
from dinov2_eq.train.estimate import GIB, count_parameters, estimate_memory, size_text

PROGRAM_TIMEOUT_S = 20  # for nvidia-smi and SLURM's commands
SILENCE_LIMIT_S = 60.0  # until a silent process counts as lost
READING_S = 2.0  # how long images are read, without and with workers
BATCHES_AHEAD = 2  # batches that each worker of a loader prepares
USABLE_SHARE = 0.9  # of a GPU's memory; the rest is for the driver, nccl and gaps
MESSAGE_BYTES = (4 * 1024, 1024**2, 64 * 1024**2)
REPETITIONS = 5
SLOW_LINK = 1 / 3  # of the median speed

Findings = Iterator[tuple[str, str]]  # (ok, info or fix; text)


class Line(NamedTuple):
    """A line of the output."""

    level: str
    check: str
    text: str

    def __str__(self) -> str:
        return f"{self.level:<6}{self.check:<14}{self.text}"


class PlannedRun(NamedTuple):
    """The run that the checks are about."""

    config: Config | None  # None if it is invalid
    launch: Launch
    device: torch.device
    processes: int  # per node
    nodes: int
    gpu_memory: float | None  # GiB; None: that of the GPU here
    output_dir: Path
    slurm: bool  # whether it will be submitted from here


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq doctor", description=__doc__)
    parser.add_argument("--config-file", help="YAML file, or the name of a packaged recipe")
    parser.add_argument("--gpus", type=int, help="GPUs per node of the planned run (default: as here)")
    parser.add_argument("--nodes", type=int, help="nodes of the planned run (default: as here)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB", help="memory of each of its GPUs (default: as here)")
    parser.add_argument("--output-dir", type=Path, default=Path("."), help="folder that it will write to")
    parser.add_argument(
        "--slurm", action="store_true", help="require SLURM, because the run will be submitted from here"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, anywhere on the line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the checks, prints the lines on the main process, and exits: with 0 if nothing needs a fix, otherwise 2."""
    args = build_parser().parse_intermixed_args(argv)
    lines: list[Line] = []
    launch = attempt(lines, "launch", find_launch, otherwise=Launch("single"))
    config = attempt(
        lines,
        "config",
        lambda: load_config(args.config_file, args.overrides, lambda text: lines.append(Line("info", "config", text))),
        otherwise=None,
    )
    wanted = config.train.device if config else "auto"
    device = attempt(lines, "device", lambda: pick_device(wanted, launch.local_rank), otherwise=torch.device("cpu"))
    processes = args.gpus or max(launch.local_world_size, torch.cuda.device_count())
    nodes = args.nodes or launch.world_size // launch.local_world_size
    plan = PlannedRun(config, launch, device, processes, nodes, args.gpu_memory, args.output_dir, args.slurm)
    checks = {"launch": check_launch, "versions": check_versions, "devices": check_devices}
    if launch.world_size > 1:
        checks["interconnect"] = check_interconnect
    if launch.rank == 0:
        checks |= {"compile": check_compile, "slurm": check_slurm}
    if config:
        checks |= {"attention": check_attention, "data": check_data, "limits": check_limits}
    if config and launch.rank == 0:
        checks |= {"disk": check_disk, "memory": check_memory}
    try:
        with stops_raise("run the same command to check again"), process_group(launch, device, SILENCE_LIMIT_S):
            for name, check in checks.items():
                lines += examine(name, check, plan)
            lines = merge(gather_objects(lines), gather_objects(socket.gethostname()))
    except Exception as error:
        text = (
            f"process {launch.rank} on {socket.gethostname()} lost the others: {first_line(error)}; check the network"
        )
        lines.append(Line("fix", "processes", text))
        launch = launch._replace(rank=0)  # so that each process prints its own lines
    if launch.rank == 0:
        print("\n".join(map(str, lines)))
    sys.exit(2 if any(line.level == "fix" for line in lines) else 0)


def attempt(lines: list[Line], check: str, function: Callable[[], Any], otherwise: Any) -> Any:
    """Calls `function` and returns its result; if it raises, adds a line with the reason and returns `otherwise`."""
    try:
        return function()
    except Exception as error:
        lines.append(Line("fix", check, " ".join(str(error).split()) or type(error).__name__))
        return otherwise


def examine(name: str, check: Callable[[PlannedRun], Findings], plan: PlannedRun) -> list[Line]:
    """Runs a check and returns its lines; if the check itself fails, the last line says so."""
    lines: list[Line] = []

    def collect() -> None:
        for level, text in check(plan):
            lines.append(Line(level, name, text))

    attempt(lines, name, collect, otherwise=None)
    return lines


def merge(lines_of_ranks: Sequence[Sequence[Line]], hosts: Sequence[str]) -> list[Line]:
    """Combines the lines of the main process with additional fixes of the other processes, which are named."""
    lines = list(lines_of_ranks[0])
    for rank, (others, host) in enumerate(zip(lines_of_ranks, hosts, strict=True)):
        new = [line for line in others if line.level == "fix" and line not in lines_of_ranks[0]]
        lines += [line._replace(text=f"process {rank} on {host}: {line.text}") for line in new]
    return lines


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def verdict(good: bool, text: str, todo: str) -> tuple[str, str]:
    """A finding that is ok, or else needs the fix `todo`."""
    return ("ok", text) if good else ("fix", f"{text}; {todo}")


def answer(*command: str) -> str:
    """Runs a program and returns its output.

    Raises:
        OSError: the program is missing, fails or does not respond; the message contains the program's own.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PROGRAM_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise OSError(f"{command[0]} did not respond within {PROGRAM_TIMEOUT_S} s") from None
    if done.returncode:
        raise OSError(f"{command[0]}: {(done.stderr or done.stdout).strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()


def check_launch(plan: PlannedRun) -> Findings:
    launch = plan.launch
    if launch.how == "single":
        yield "info", "one process; torchrun and srun are recognised by their environment variables"
    else:
        nodes = launch.world_size // launch.local_world_size
        yield (
            "ok",
            f"{launch.how}: {launch.world_size} processes on {nodes} nodes, connected through {launch.master_addr}",
        )


def check_versions(plan: PlannedRun) -> Findings:
    versions = [f"python {platform.python_version()}"]
    for text in metadata.requires("dinov2_eq") or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            yield "fix", f"{requirement.name} is missing: pip install '{requirement.name}{requirement.specifier}'"
            continue
        versions.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            yield "fix", f"{requirement.name} {version}: pip install '{requirement.name}{requirement.specifier}'"
    yield "ok", ", ".join(versions)


def check_devices(plan: PlannedRun) -> Findings:
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield "ok", f"{cores} CPU cores, {torch.get_num_threads()} threads of torch, {ram:.0f} GiB of memory"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield "ok", f"GPU {index}: {properties.name}, {size_text(properties.total_memory / GIB)}"
    built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
    if torch.cuda.is_available():
        yield "ok", f"{built} and works with this driver; this process uses {plan.device}"
    elif shutil.which("nvidia-smi"):
        driver = answer("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
        yield "fix", f"{built} and sees no GPU, but nvidia-smi does ({driver}); install a torch build for that driver"
    else:
        yield "info", "no NVIDIA driver and no GPU: runs here use the CPU"


def check_compile(plan: PlannedRun) -> Findings:
    obstacle = why_compile_fails(plan.device)
    if not obstacle:
        yield "ok", f"torch.compile works on {plan.device}"
    elif plan.config is not None and plan.config.fsdp.compile:
        yield verdict(False, f"torch.compile does not work: {obstacle}", "fix it, or set fsdp.compile=false")
    else:
        yield "info", f"torch.compile does not work: {obstacle}"


def check_attention(plan: PlannedRun) -> Findings:
    for dtype in (torch.float32, torch.bfloat16):
        backend = choose_backend(plan.config.student.attention, plan.device, dtype)
        yield "ok", f"student.attention={plan.config.student.attention} means {backend} for {dtype} on {plan.device}"


def seconds_of(function: Callable[[], Any], device: torch.device) -> float:
    """Median duration of a few calls, after two warm-up calls."""
    seconds = []
    for _ in range(REPETITIONS + 2):
        began = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[2:])


def check_interconnect(plan: PlannedRun) -> Findings:
    """Measures an all-reduce over all processes, then messages between pairs of nodes, one pair after the other."""
    world, device = get_world_size(), plan.device
    backend = "nccl" if device.type == "cuda" else "gloo"
    for size in MESSAGE_BYTES:
        message = torch.zeros(size // 4, device=device)
        seconds = max(gather_objects(seconds_of(lambda message=message: dist.all_reduce(message), device)))
        speed = 2 * (world - 1) / world * size / seconds / 1e9  # sent by each process, as nccl-tests counts it
        yield "ok", f"{backend} all-reduce of {size / 1024**2:.3g} MiB: {seconds * 1e3:.2f} ms, {speed:.3g} GB/s"
    hosts = gather_objects(socket.gethostname())
    # With several nodes, only links between them are measured, because links within a node are faster.
    ring = [rank for rank, host in enumerate(hosts) if host not in hosts[:rank] or len(set(hosts)) == 1]
    links = list(zip(ring, [*ring[1:], ring[0]], strict=True))
    seconds = [gather_objects(seconds_there_and_back(*link, message))[link[0]] for link in links]
    speeds = [2 * message.nbytes / each / 1e9 for each in seconds]
    slowest, median = min(zip(speeds, links, strict=True)), statistics.median(speeds)
    ends = " to ".join(f"process {rank} on {hosts[rank]}" for rank in slowest[1])
    text = f"slowest link: {ends}, {slowest[0]:.3g} GB/s; the median is {median:.3g} GB/s"
    yield verdict(slowest[0] > SLOW_LINK * median, text, "check those hosts, or exclude one with --exclude")


def seconds_there_and_back(source: int, target: int, message: Tensor) -> float:
    """Duration of sending a message from one process to another and back; meaningless on the other processes."""

    def exchange() -> None:
        if get_rank() == source:
            dist.send(message, target)
            dist.recv(message, target)
        elif get_rank() == target:
            dist.recv(message, source)
            dist.send(message, source)

    return seconds_of(exchange, message.device)


def check_data(plan: PlannedRun) -> Findings:
    """Reads images through the loader of the training in small batches, and checks the space for workers' batches."""
    config = deepcopy(plan.config)
    config.train.batch_size_per_gpu = min(config.train.batch_size_per_gpu, 8)
    dataset = build_dataset(config.train.dataset_path)
    yield "ok", f"{config.train.dataset_path}: {len(dataset):,} images"
    step = plan.config.train.batch_size_per_gpu * plan.config.train.accumulation_steps
    for workers in sorted({0, config.train.num_workers}):
        batches, images, skipped = iter(build_train_loader(config, dataset, 0, workers)), 0, 0
        batch = next(batches)  # not measured, because files are listed and workers started
        began = time.perf_counter()
        while (seconds := time.perf_counter() - began) < READING_S or not images:
            batch = next(batches)
            images, skipped = images + len(batch.anchor_crops), skipped + len(batch.skipped)
        waiting = f"the {step} images of a step take {step * seconds / images:.1f} s"
        yield "ok", f"{workers} workers: {images / seconds:.0f} images per second in each process; {waiting}"
        if skipped > config.train.max_corrupt_share * images:
            yield "fix", f"{skipped} of {images} images are unreadable, above train.max_corrupt_share; repair them"
    size = sum(value.nbytes for value in batch if isinstance(value, Tensor)) / config.train.batch_size_per_gpu
    ahead = size * plan.config.train.batch_size_per_gpu * workers * BATCHES_AHEAD * plan.processes
    shared = shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None
    if shared is not None and workers:
        batches_text = f"{plan.processes} x {workers} workers' batches take {size_text(ahead / GIB)}"
        text = f"/dev/shm has {size_text(shared / GIB)} free, {batches_text}"
        yield verdict(ahead < shared, text, "lower train.num_workers or mount it larger")


def check_limits(plan: PlannedRun) -> Findings:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + 64 * plan.config.train.num_workers  # each tensor that a worker sends is an open file
    text = f"{limit} open files allowed, about {needed} needed"
    yield verdict(limit >= needed, text, f"run ulimit -n {needed} first")


def check_disk(plan: PlannedRun) -> Findings:
    check_writable(plan.output_dir)
    arch = build_arch(plan.config, torch.device("meta"))
    trained = sum(count_parameters(arch.trainable_modules()).values())
    size = 4 * (3 * trained + sum(parameter.numel() for parameter in arch.teacher.parameters())) / GIB
    keep, every = plan.config.train.keep_checkpoints, plan.config.train.keep_checkpoint_every_steps
    number = keep + 1 + (plan.config.optim.steps // every if every else 0)  # + 1 for the one being written
    free = shutil.disk_usage(plan.output_dir).free / GIB
    text = f"{plan.output_dir} has {size_text(free)} free, {number} checkpoints of {size_text(size)} are needed"
    yield verdict(number * size < free, text, "choose another folder or lower train.keep_checkpoints")


def check_memory(plan: PlannedRun) -> Findings:
    config, world, available = plan.config, plan.processes * plan.nodes, plan.gpu_memory
    if available is None and plan.device.type == "cuda":
        available = torch.cuda.get_device_properties(plan.device).total_memory / GIB
    half_precision = uses_half_precision(config, plan.device if available is None else torch.device("cuda"))
    arch = build_arch(config, torch.device("meta"))
    memory = estimate_memory(config, arch, half_precision, world, plan.nodes)
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in memory.items() if name != "total")
    text = f"about {size_text(memory['total'])} for each of {world} processes ({parts})"
    if available is None:
        yield "info", f"{text}; --gpu-memory GIB compares it with a GPU"
        return
    todo = "halve train.batch_size_per_gpu and double train.accumulation_steps, or fsdp.activation_checkpointing=true"
    yield verdict(memory["total"] < USABLE_SHARE * available, f"{text}, of {size_text(available)} less a tenth", todo)


def check_slurm(plan: PlannedRun) -> Findings:
    try:
        yield "ok", f"{answer('sbatch', '--version')}, submitit {metadata.version('submitit')}"
        yield "ok", answer("scontrol", "ping").splitlines()[0]
        partitions = answer("sinfo", "--noheader", "--format=%P %a, %D nodes, time limit %l").splitlines()
    except OSError as error:
        text = f"SLURM does not respond ({first_line(error)})"
        yield verdict(False, text, "run this on a submit node, or set SLURM_CONF") if plan.slurm else ("info", text)
        return
    yield verdict(bool(partitions), f"partitions: {'; '.join(partitions)}", "request access to one")
    try:
        answer("sacct", "--noheader", "--allocations", "--format=JobID")
        yield "ok", "accounting works"
    except OSError as error:
        yield "info", f"no accounting ({first_line(error)}): submitit cannot report the state of finished jobs"


if __name__ == "__main__":
    main()
