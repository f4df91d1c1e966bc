"""`dinov2-eq train`: the command line and the training loop."""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from dinov2_eq.checkpointer import Checkpointer
from dinov2_eq.checkpointer.lock import FolderLock
from dinov2_eq.config.load import load_config, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.data.corrupt import CorruptCounter
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.workers import lost_workers_explained
from dinov2_eq.distributed import (
    from_main_process,
    get_local_world_size,
    get_world_size,
    is_main_process,
    pick_device,
)
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.distributed.signals import StoppedBySignal, StopRequest
from dinov2_eq.files import check_writable, disk_errors_explained
from dinov2_eq.logging import setup_logging
from dinov2_eq.train import run_folder
from dinov2_eq.train.build import (
    build_train_loader,
    global_batch_size,
    make_run,
    uses_half_precision,
)
from dinov2_eq.train.cautions import cautions
from dinov2_eq.train.dry_run import print_plan
from dinov2_eq.train.estimate import plan
from dinov2_eq.train.meter import StepMeter
from dinov2_eq.train.observer import build_observer
from dinov2_eq.train.online_knn import build_online_knn
from dinov2_eq.train.pretrained import find_pretrained, load_optimizer, read_pretrained
from dinov2_eq.train.state import TrainingState
from dinov2_eq.train.step import train_step
from dinov2_eq.types import CollatedBatch
from dinov2_eq.waiting import SignalWatch

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dinov2-eq train", description="Pretrain a backbone.")
    parser.add_argument("--config-file", help="YAML file, or the name of a packaged recipe such as debug")
    parser.add_argument("--output-dir", "--output_dir", type=Path, help="run folder; an interrupted run in it resumes")
    parser.add_argument("--no-resume", action="store_true", help="start over; an earlier run moves to previous-<n>/")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    parser.add_argument("--dry-run", action="store_true", help="print batch, steps, parameters and memory, and exit")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config overrides, anywhere on the line")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_intermixed_args(argv)
    remarks: list[str] = []
    config = load_config(args.config_file, args.overrides, remarks.append)
    if args.print_config:
        for remark in remarks:
            print(remark, file=sys.stderr)
        print(to_yaml(config), end="")
    elif args.dry_run:
        for remark in remarks:
            print(remark)
        print_plan(config, uses_half_precision(config, pick_device(config.train.device)))
    elif args.output_dir is None:
        raise ValueError("--output-dir is missing: name the folder that the run writes to")
    else:
        do_train(config, args.output_dir, resume=not args.no_resume, remarks=remarks)


def do_train(config: Config, output_dir: Path, *, resume: bool = True, remarks: Sequence[str] = ()) -> None:
    """Trains to `optim.steps`, resuming from the newest checkpoint in `output_dir` if there is one.

    All processes of a launcher must call it; see `distributed.launch`. If another process is lost, this one exits with
    code 5; see `distributed.heartbeat`.

    Args:
        remarks: sentences for the log, such as those about the config.

    Raises:
        ValueError: config, data or checkpoint cannot be used, or another run is using the folder.
        OSError: `output_dir` cannot be written.
        NonFiniteError: a loss or gradient is NaN or infinite; the weights are those before that step.
        StoppedBySignal: SIGTERM, SIGUSR2 or SIGHUP reached a process; the state is saved.
    """
    launch = find_launch()
    device = pick_device(config.train.device, launch.local_rank)
    with (
        SignalWatch("rerun the same command to resume from the newest checkpoint, if there is one"),
        StopRequest() as stop,
        process_group(launch, device, config.train.lost_rank_timeout_s),
    ):
        check_writable(output_dir)
        setup_logging(output_dir)
        if is_main_process():
            for sentence in (*remarks, *cautions(config)):
                logger.warning("%s", sentence)
        folder = output_dir / run_folder.CHECKPOINTS
        kept, kept_for_ever = config.train.keep_checkpoints, config.train.keep_checkpoint_every_steps
        with (
            FolderLock(output_dir) as lock,
            closing(Checkpointer(folder, kept, kept_for_ever)) as checkpointer,
            lost_workers_explained(),
            disk_errors_explained(output_dir),
        ):
            from_main_process(lock.acquire, "the lock of the run folder")
            _train(config, output_dir, device, checkpointer, stop, resume)


def _train(
    config: Config,
    output_dir: Path,
    device: torch.device,
    checkpointer: Checkpointer,
    stop: StopRequest,
    resume: bool,
) -> None:
    half_precision = uses_half_precision(config, device)
    data = config.train.dataset_path
    dataset = from_main_process(lambda: build_dataset(data), f"{data} to be opened")
    knn = from_main_process(lambda: build_online_knn(config, half_precision), "the data of the online k-NN")
    newest = checkpointer.newest_whole() if resume else None
    pretrained = find_pretrained(config.student.pretrained_weights) if newest is None else ""
    run = make_run(config, device, partial(read_pretrained, pretrained) if pretrained else None)
    arch = run.arch
    corrupt = CorruptCounter(config.train.max_corrupt_share)
    state = TrainingState(arch, run.optimizer, corrupt, global_batch_size(config))
    start = 0
    if newest is not None:
        from_main_process(lambda: run_folder.require_same_run(output_dir, config))
        start = state.load(checkpointer, newest)
    elif pretrained:
        load_optimizer(pretrained, arch, run.optimizer)
    if start >= config.optim.steps:
        logger.info("this run is finished: step %d of optim.steps=%d", start, config.optim.steps)
        return
    if not resume:
        from_main_process(lambda: run_folder.set_aside(output_dir))
    run_folder.describe(output_dir, config, device)
    precision = "bfloat16 autocast" if half_precision else "float32"
    processes, nodes = get_world_size(), get_world_size() // get_local_world_size()
    what = plan(config, arch, len(dataset), half_precision, processes, nodes)
    logger.info("%s, %s\n%s", device, precision, what)

    observer = build_observer(config, output_dir, run, dataset, knn, start)
    if start == 0:
        observer.act(0)
    loader = build_train_loader(config, dataset, start, config.train.num_workers)
    batches, meter = _counted(loader, corrupt), StepMeter()
    for step in range(start, config.optim.steps):
        scheduled = train_step(run, step, batches, meter)

        done = step + 1
        signum = stop.agreed(device)
        saves = done % config.train.checkpoint_period_steps == 0 or done == config.optim.steps or signum
        if saves or done % config.train.log_period_steps == 0:
            corrupt.check()
        if saves:
            with meter.paused():
                checkpointer.save(done, state.state_dict())
        observer.after_step(done, meter, {**scheduled._asdict(), "corrupt_images": corrupt.num_corrupt})
        if signum and done < config.optim.steps:
            checkpointer.wait()
            raise StoppedBySignal(signum, done)
    checkpointer.wait()
    observer.close()
    logger.info("finished: %d steps in %s", config.optim.steps, output_dir)


def _counted(batches: Iterable[CollatedBatch], corrupt: CorruptCounter) -> Iterator[CollatedBatch]:
    for batch in batches:
        corrupt.add(batch.skipped, len(batch.anchor_crops))
        yield batch


if __name__ == "__main__":
    main()
