"""The checks of `dinov2-eq submit`, so that a job does not wait for hours only to fail."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.evaluation.command_line import encoder_of
from dinov2_eq.evaluation.results import results_folder
from dinov2_eq.run.cli import COMMANDS
from dinov2_eq.run.job import START_AGAIN
from dinov2_eq.train import run_folder
from dinov2_eq.train.build import uses_half_precision
from dinov2_eq.train.cautions import cautions
from dinov2_eq.train.dry_run import count_images, outline
from dinov2_eq.train.estimate import estimate_memory, plan

USABLE_MEMORY = 0.9  # share of a GPU's memory that an estimate may fill


class Resources(NamedTuple):
    """What a job requests."""

    nodes: int
    gpus_per_node: int
    tasks_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.tasks_per_node


class Checked(NamedTuple):
    """A command that passed the checks."""

    argv: list[str]
    config: str | None  # text of the file that --config-file must name in `argv`; None: `argv` is complete
    output_dir: Path
    summary: str  # for the user
    dry_run: bool  # the user only asked for the checks


def check_training(argv: Sequence[str], resources: Resources, gpu_memory: float | None) -> Checked:
    """Resolves the config, opens the data and estimates the memory of a training run.

    Args:
        gpu_memory: GiB of each GPU; None: not checked.

    Raises:
        ValueError, OSError: the run cannot work.
    """
    args = importlib.import_module(COMMANDS["train"][0]).build_parser().parse_intermixed_args(argv)
    remarks: list[str] = []
    config = load_config(args.config_file, args.overrides, remarks.append)
    if args.output_dir is None:
        raise ValueError("--output-dir is missing: name the folder that the run writes to")
    if not args.no_resume and any((args.output_dir / run_folder.CHECKPOINTS).glob("*")):
        run_folder.require_same_run(args.output_dir, config)
    on_gpu = resources.gpus_per_node > 0 and config.train.device != "cpu"
    half_precision = uses_half_precision(config, torch.device("cuda" if on_gpu else "cpu"))
    arch, num_images = outline(config), count_images(config, half_precision)
    planned = plan(config, arch, num_images, half_precision, resources.world_size, resources.nodes)
    summary = "\n".join([*remarks, planned, *cautions(config)])
    needed = estimate_memory(config, arch, half_precision, resources.world_size, resources.nodes)["total"]
    if gpu_memory is not None and needed > USABLE_MEMORY * gpu_memory:
        raise ValueError(
            f"A process needs about {needed:.1f} GiB, more than {USABLE_MEMORY:.0%} of --gpu-memory {gpu_memory:g}. "
            "Lower train.batch_size_per_gpu and raise train.accumulation_steps, set fsdp.activation_checkpointing=true "
            f"or use more GPUs\n{summary}"
        )
    job_argv = ["train", "--output-dir", str(args.output_dir), *([START_AGAIN] if args.no_resume else [])]
    return Checked(job_argv, to_yaml(config), args.output_dir, summary, args.dry_run)


def check_evaluation(command: str, argv: Sequence[str]) -> Checked:
    """Runs the evaluation with --dry-run; errors are those of the evaluation."""
    module = importlib.import_module(COMMANDS[command][0])
    module.main([*argv, "--dry-run"])
    args = module.build_parser().parse_args(argv)
    encoder = encoder_of(args)
    output_dir = results_folder(encoder if isinstance(encoder, str) else encoder[0], args.output_dir)
    return Checked(
        [*command.split(), *argv], None, output_dir, f"{command}: encoder and data are available", args.dry_run
    )
