"""`dinov2-eq train`: the command line and the training loop."""

import argparse
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.data.augmentations import make_views
from dinov2_eq.data.corrupt import CorruptCounter
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import to_device
from dinov2_eq.distributed import is_main_process, pick_device
from dinov2_eq.logging import MetricLogger, describe_run, setup_logging
from dinov2_eq.train.build import (
    build_arch,
    build_optimizer,
    build_schedules,
    build_task_transform,
    build_train_loader,
    num_reconstructed,
)
from dinov2_eq.train.estimate import plan
from dinov2_eq.train.online_knn import OnlineKnn
from dinov2_eq.train.param_groups import apply_schedule
from dinov2_eq.train.run_folder import RunFolder
from dinov2_eq.train.samples import SampleWriter
from dinov2_eq.train.state import TrainingState
from dinov2_eq.train.step import StepMeter, optimize

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
        device = pick_device(config.train.device)
        arch = build_arch(config, torch.device("meta"))
        num_images = len(build_dataset(config.train.dataset_path))
        print(plan(config, arch, num_images, half_precision=autocast_dtype(config, device) is not None))
    elif args.output_dir is None:
        raise ValueError("--output-dir is missing: name the folder that the run writes to")
    else:
        do_train(config, args.output_dir, resume=not args.no_resume)


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """None where everything is computed in float32."""
    precision = config.compute_precision.dtype
    half = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.bfloat16 if half else None


def do_train(config: Config, output_dir: Path, *, resume: bool = True) -> None:
    """Trains to `optim.steps`, from the newest checkpoint of `output_dir` where there is one.

    Raises:
        ValueError: config, data or checkpoint that cannot be used.
        OSError: `output_dir` cannot be written.
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those before that step.
    """
    folder = RunFolder(output_dir)
    folder.prepare(fresh=not resume)
    setup_logging(output_dir)
    device = pick_device(config.train.device)
    dtype = autocast_dtype(config, device)
    dataset = build_dataset(config.train.dataset_path)
    online_knn = None
    if config.evaluation.knn_period_steps > 0:
        online_knn = OnlineKnn(config.evaluation, config.crops, config.train.num_workers)

    arch = build_arch(config, device)
    optimizer = build_optimizer(config, arch)
    schedules = build_schedules(config)
    corrupt = CorruptCounter(config.train.max_corrupt_share)
    checkpointer = Checkpointer(output_dir / "checkpoints", config.train.keep_checkpoints)
    state = TrainingState(arch, optimizer, corrupt, device)
    torch.manual_seed(config.train.seed)
    steps, start = config.optim.steps, 0
    newest = checkpointer.newest_whole()
    if newest is not None:
        start = state.load(checkpointer, newest)
        logger.info("resumed from %s at step %d", checkpointer.folder / str(newest), start)
    if start >= steps:
        logger.info("this run is finished: step %d of optim.steps=%d", start, steps)
        return
    folder.describe(config, describe_run())
    logger.info(
        "%d images, device %s, autocast %s\n%s",
        len(dataset),
        device,
        dtype,
        plan(config, arch, len(dataset), dtype is not None),
    )

    size = (config.crops.global_crops_size,) * 2
    transform = build_task_transform(config.equivariance)
    views = {"transform": transform, "size": size, "mean": config.crops.mean, "std": config.crops.std}
    samples = None
    if config.evaluation.sample_period_steps > 0 and is_main_process():
        first_batch = to_device(next(iter(build_train_loader(config, dataset, 0))), device)
        shown = config.equivariance.num_intermediates if config.equivariance.enabled else 0
        samples = SampleWriter(output_dir / "samples", first_batch, num_intermediates=shown, **views)
        if start == 0:
            samples.write(arch, 0)
    metrics = MetricLogger(output_dir, start) if is_main_process() else None

    def is_due(period: int, done: int) -> bool:
        return period > 0 and (done % period == 0 or done == steps)

    def evaluate_knn(done: int) -> None:
        top1 = online_knn.accuracy(arch.teacher["backbone"], device)
        logger.info("step %d  k-NN top-1 %.2f %%", done, top1)
        if metrics:
            metrics.log(done, {"eval/knn_top1": top1})

    if online_knn and start == 0:
        evaluate_knn(0)
    batches = iter(build_train_loader(config, dataset, start))
    meter = StepMeter()
    bar = tqdm(total=steps, initial=start, disable=not (sys.stdout.isatty() and is_main_process()), unit="step")
    for step in range(start, steps):
        scheduled = schedules.at(step)
        apply_schedule(optimizer.param_groups, scheduled)
        optimizer.zero_grad()
        for _ in range(config.train.accumulation_steps):
            asked = time.perf_counter()
            batch = next(batches)
            meter.waited(time.perf_counter() - asked)
            corrupt.add(batch.skipped, config.train.batch_size_per_gpu)
            view_batch = make_views(
                to_device(batch, device), num_intermediates=num_reconstructed(config.equivariance), **views
            )
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = arch(view_batch, scheduled)
            meter.add(output, config.train.batch_size_per_gpu)
            meter.require_finite(output, step)
            (output.total / config.train.accumulation_steps).backward()
        meter.grad_norms = optimize(optimizer, arch.trainable_modules(), config.optim.clip_grad, step)
        arch.end_step(scheduled.teacher_momentum)

        done = step + 1
        bar.update()
        if done % config.train.log_period_steps == 0 or done == steps:
            values = meter.summary() | {
                "lr": scheduled.lr,
                "weight_decay": scheduled.weight_decay,
                "teacher_momentum": scheduled.teacher_momentum,
                "teacher_temp": scheduled.teacher_temp,
                "corrupt_images": corrupt.num_corrupt,
            }
            logger.info("%s", meter.line(values, done, steps))
            if metrics:
                metrics.log(done, values)
            meter.reset()
        if is_due(config.evaluation.sample_period_steps, done) and samples:
            samples.write(arch, done)
        if is_due(config.evaluation.knn_period_steps, done) and online_knn:
            evaluate_knn(done)
        if is_due(config.evaluation.eval_period_steps, done) or done == steps:
            logger.info("wrote %s", folder.write_teacher(arch.teacher, config, done))
        if is_due(config.train.checkpoint_period_steps, done):
            state.save(checkpointer, done)
        meter.resume_clock()
    bar.close()
    if metrics:
        metrics.close()
    logger.info("finished: %d steps in %s", steps, output_dir)


if __name__ == "__main__":
    main()
