"""The command `dinov2-eq submit`: checks a command, copies code and settings, and queues it or starts it here."""

import argparse
import importlib
import os
import shutil
import time
from collections.abc import Sequence
from typing import Any

import torch
from submitit.core.utils import JobPaths

from dinov2_eq.evaluation.command_line import positive
from dinov2_eq.files import check_writable
from dinov2_eq.run.cli import COMMANDS
from dinov2_eq.run.executors import copy_code, queue_on_slurm, slurm_executor, start_on_this_host
from dinov2_eq.run.job import Job
from dinov2_eq.run.precheck import Resources, check_evaluation, check_training

# What can be submitted: NAME on the command line -> the command. `eval all` submits jobs itself.
PROGRAMS = {"train": "train"} | {
    name.removeprefix("eval "): name for name in COMMANDS if name.startswith("eval ") and name != "eval all"
}
GPUS_PER_NODE = 8


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov2-eq submit",
        description="Check a command, and queue it on SLURM or start it on this host.",
        epilog="All other flags and key=value arguments belong to the command, see 'dinov2-eq train --help'. %j in "
        "--output-dir stands for the job number. With --dry-run everything is checked and nothing is queued.",
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=PROGRAMS, metavar="NAME", help=", ".join(PROGRAMS))
    add = parser.add_argument_group("where and how long").add_argument
    add("--cluster", choices=("slurm", "local", "debug"), help="local: this host; debug: this process")
    add("--partition", metavar="TEXT", help="default: the cluster's own")
    add("--nodes", "--nnodes", type=positive, default=1, metavar="N", help="default: 1")
    add(
        *("--gpus-per-node", "--gpus", "--ngpus"),
        type=int,
        metavar="N",
        help=f"one process per GPU; default: {GPUS_PER_NODE}, with --cluster local all",
    )
    add("--tasks-per-node", type=positive, metavar="N", help="processes, if --gpus-per-node is 0; default: 1")
    add("--cpus-per-task", type=positive, default=10, metavar="N", help="cores per process; default: 10")
    add("--mem-gb", type=int, default=0, metavar="GB", help="main memory per node; default: all of it")
    add("--gpu-memory", type=float, metavar="GIB", help="memory per GPU; training that needs more is refused")
    add("--timeout", type=positive, default=2800, metavar="MIN", help="time until it is requeued; default: 2800")
    add("--signal-delay", type=positive, default=120, metavar="S", help="seconds to save before that; default: 120")
    add("--max-requeues", type=int, default=30, metavar="N", help="timeouts before it fails; default: 30")
    add("--exclude", metavar="NODES", help="nodes to avoid")
    add("--comment", metavar="TEXT")
    add("--job-name", metavar="TEXT", help="default: dinov2-eq-NAME")
    add(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY[=VALUE]",
        help="any other parameter of sbatch, repeatable: qos=high, constraint=volta32gb, gres=gpu:8, exclusive",
    )
    add("--print-sbatch", action="store_true", help="print the sbatch script and queue nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args, rest = build_parser().parse_known_args(argv)
    command = PROGRAMS[args.name]
    cluster = "slurm" if args.print_sbatch else choose_cluster(args.cluster)
    resources = choose_resources(args, cluster)
    if command == "train":
        checked = check_training(rest, resources, args.gpu_memory)
    else:
        checked = check_evaluation(command, rest)
    # %j is not known yet, so files that are written now go to the parent folder of the part that contains it.
    known_folder = JobPaths.get_first_id_independent_folder(checked.output_dir)
    folder = known_folder / "submitit" / time.strftime(f"%Y%m%d-%H%M%S-{os.getpid()}")
    executor = slurm_executor(folder, args.max_requeues, slurm_parameters(args, resources))
    if args.print_sbatch:
        print(executor.script())
        return
    print(checked.summary)
    if checked.dry_run:
        return
    check_writable(known_folder)
    if cluster == "debug":
        importlib.import_module(COMMANDS[command][0]).main([argument.replace("%j", "debug") for argument in rest])
        return
    try:
        copy_code(folder)
        job_argv = checked.argv
        if checked.config is not None:
            (folder / "config.yaml").write_text(checked.config)
            job_argv = [*job_argv, "--config-file", str(folder / "config.yaml")]
        job = Job(job_argv, os.getcwd())
        if cluster == "slurm":
            print(queue_on_slurm(executor, job))
        else:
            print(start_on_this_host(folder, args.max_requeues, local_parameters(args, resources), job))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def choose_cluster(name: str | None) -> str:
    """Chooses the cluster, by default SLURM if it is available; raises ValueError for "slurm" without SLURM."""
    has_slurm = shutil.which("sbatch") is not None
    if name == "slurm" and not has_slurm:
        raise ValueError("--cluster slurm: sbatch is not on PATH; load the SLURM module, or use --cluster local")
    if name is None:
        name = "slurm" if has_slurm else "local"
        print(f"--cluster {name}, as sbatch is {'' if has_slurm else 'not '}on PATH")
    return name


def choose_resources(args: argparse.Namespace, cluster: str) -> Resources:
    """Determines nodes, GPUs and processes; raises ValueError if the flags contradict each other or this host."""
    gpus_here = torch.cuda.device_count()
    default = {"slurm": GPUS_PER_NODE, "local": gpus_here, "debug": min(gpus_here, 1)}[cluster]
    gpus = default if args.gpus_per_node is None else args.gpus_per_node
    tasks = args.tasks_per_node or max(gpus, 1)
    if gpus and tasks != gpus:
        raise ValueError(
            f"--tasks-per-node {tasks}: each of the {gpus} GPUs of a node gets one process; omit the flag, or use "
            "--gpus-per-node 0 for processes without a GPU"
        )
    if cluster != "slurm" and args.nodes > 1:
        raise ValueError(f"--nodes {args.nodes}: --cluster {cluster} only uses this host; use --nodes 1, or SLURM")
    if cluster != "slurm" and gpus > gpus_here:
        raise ValueError(f"--gpus-per-node {gpus}: torch sees {gpus_here} GPUs on this host")
    if cluster == "debug" and tasks > 1:
        raise ValueError(f"--cluster debug is one process, not {tasks}; use --cluster local for several")
    return Resources(args.nodes, gpus, tasks)


def slurm_parameters(args: argparse.Namespace, resources: Resources) -> dict[str, Any]:
    """Parameters of `submitit.SlurmExecutor`; --slurm takes precedence over other flags."""
    own: dict[str, str | bool] = {"requeue": True}  # also after a lost node, and where it is not the default
    for parameter in args.slurm:
        key, has_value, value = parameter.partition("=")
        own[key.replace("-", "_")] = value if has_value else True
    parameters = {
        "job_name": args.job_name or f"dinov2-eq-{args.name}",
        "partition": args.partition,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": args.cpus_per_task,
        "time": args.timeout,
        "signal_delay_s": args.signal_delay,
        "exclude": args.exclude,
        "comment": args.comment,
        "additional_parameters": own,
    }
    if resources.gpus_per_node and not any(key.startswith(("gres", "gpus")) for key in own):
        parameters["gpus_per_node"] = resources.gpus_per_node
    if not any(key.startswith("mem") for key in own):
        parameters["mem"] = f"{args.mem_gb}G"
    return {key: value for key, value in parameters.items() if value is not None}


def local_parameters(args: argparse.Namespace, resources: Resources) -> dict[str, Any]:
    """Parameters of `submitit.LocalExecutor`; raises ValueError if CUDA_VISIBLE_DEVICES does not list numbers."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible and resources.gpus_per_node else []
    if not all(gpu.isdecimal() for gpu in gpus):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: list the GPUs by number, such as 0,1")
    return {
        "tasks_per_node": resources.tasks_per_node,
        "gpus_per_node": resources.gpus_per_node,
        "visible_gpus": tuple(int(gpu) for gpu in gpus),  # (): all
        "timeout_min": args.timeout,
        "signal_delay_s": args.signal_delay,
    }
