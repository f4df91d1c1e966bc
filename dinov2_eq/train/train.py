"""`dinov2-eq train`: the command line and the training loop."""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.data.corrupt import CorruptCounter
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import to_device
from dinov2_eq.distributed import pick_device, require_one_process
from dinov2_eq.logging import check_writable, setup_logging
from dinov2_eq.train import run_folder
from dinov2_eq.train.build import (
    build_arch,
    build_make_views,
    build_multi_crop,
    build_optimizer,
    build_schedules,
    build_train_loader,
    num_reconstructed,
)
from dinov2_eq.train.estimate import plan
from dinov2_eq.train.finite import clip_gradients, require_finite
from dinov2_eq.train.meter import StepMeter
from dinov2_eq.train.observer import build_observer
from dinov2_eq.train.online_knn import build_online_knn
from dinov2_eq.train.param_groups import apply_schedule
from dinov2_eq.train.state import TrainingState

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq train", description="Pretrain a backbone.")
    parser.add_argument("--config-file", help="YAML file, or the name of a packaged recipe such as debug")
    parser.add_argument("--output-dir", "--output_dir", type=Path, help="run folder; an interrupted run there goes on")
    parser.add_argument("--no-resume", action="store_true", help="start again; checkpoints of the folder are set aside")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="print batch, steps, parameters and memory, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, anywhere on the line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    config = load_config(args.config_file, args.overrides)
    if args.print_config:
        print(to_yaml(config), end="")
    elif args.dry_run:
        half_precision = uses_half_precision(config, pick_device(config.train.device))
        arch = build_arch(config, torch.device("meta"))
        build_multi_crop(config)
        build_online_knn(config, half_precision)
        num_images = len(build_dataset(config.train.dataset_path))
        print(plan(config, arch, num_images, half_precision))
    elif args.output_dir is None:
        raise ValueError("--output-dir is missing: name the folder that the run writes to")
    else:
        do_train(config, args.output_dir, resume=not args.no_resume)


def uses_half_precision(config: Config, device: torch.device) -> bool:
    """Whether networks run under bfloat16 autocast; weights, losses and optimizer stay float32."""
    precision = config.compute_precision.dtype
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def do_train(config: Config, output_dir: Path, *, resume: bool = True) -> None:
    """Trains to `optim.steps`, from the newest checkpoint of `output_dir` where there is one.

    Raises:
        ValueError: config, data or checkpoint that cannot be used.
        OSError: `output_dir` cannot be written.
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those before that step.
    """
    require_one_process()
    check_writable(output_dir)
    setup_logging(output_dir)
    device = pick_device(config.train.device)
    half_precision = uses_half_precision(config, device)
    dataset = build_dataset(config.train.dataset_path)
    knn = build_online_knn(config, half_precision)
    arch = build_arch(config, device)
    optimizer = build_optimizer(config, arch)
    schedules = build_schedules(config)
    corrupt = CorruptCounter(config.train.max_corrupt_share)
    torch.manual_seed(config.train.seed)  # of stochastic depth, the only thing that draws from torch's own generator

    if not resume:
        run_folder.set_aside(output_dir)
    checkpointer = Checkpointer(output_dir / run_folder.CHECKPOINTS, config.train.keep_checkpoints)
    state = TrainingState(arch, optimizer, corrupt, device)
    newest = checkpointer.newest_whole()
    start = 0
    if newest is not None:
        run_folder.require_same_run(output_dir, config)
        start = state.load(checkpointer, newest)
    if start >= config.optim.steps:
        logger.info("this run is finished: step %d of optim.steps=%d", start, config.optim.steps)
        return
    run_folder.describe(output_dir, config, device)
    precision = "bfloat16 autocast" if half_precision else "float32"
    logger.info("%s, %s\n%s", device, precision, plan(config, arch, len(dataset), half_precision))

    observer = build_observer(config, output_dir, arch, dataset, knn, device, half_precision, start)
    if start == 0:
        observer.act(0)
    batches = iter(build_train_loader(config, dataset, start, config.train.num_workers))
    make_views = build_make_views(config, num_reconstructed(config.equivariance))
    accumulation_steps = config.train.accumulation_steps
    meter = StepMeter()
    for step in range(start, config.optim.steps):
        scheduled = schedules.at(step)
        apply_schedule(optimizer.param_groups, scheduled)
        optimizer.zero_grad()
        for _ in range(accumulation_steps):
            with meter.waiting():
                batch = next(batches)
            corrupt.add(batch.skipped, config.train.batch_size_per_gpu)
            views = make_views(to_device(batch, device))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half_precision):
                output = arch(views, scheduled)
            require_finite(output, step)
            meter.add(output, config.train.batch_size_per_gpu)
            (output.total / accumulation_steps).backward()
        meter.end_step(clip_gradients(arch.trainable_modules(), config.optim.clip_grad, step))
        optimizer.step()
        arch.end_step(scheduled.teacher_momentum)

        done = step + 1
        observer.after_step(done, meter, {**scheduled._asdict(), "corrupt_images": corrupt.num_corrupt})
        if done % config.train.checkpoint_period_steps == 0 or done == config.optim.steps:
            with meter.paused():
                state.save(checkpointer, done)
    observer.close()
    logger.info("finished: %d steps in %s", config.optim.steps, output_dir)


if __name__ == "__main__":
    main()
