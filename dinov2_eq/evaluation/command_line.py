"""Shared parts of the evaluation programs: flags, device, record of the protocol, and table at the end."""

import argparse
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dinov2_eq.data.workers import lost_workers_explained
from dinov2_eq.distributed import from_main_process, get_world_size, pick_device
from dinov2_eq.distributed.launch import find_launch, process_group
from dinov2_eq.distributed.signals import stops_raise
from dinov2_eq.files import check_writable
from dinov2_eq.logging import describe_run, setup_logging

logger = logging.getLogger(__name__)

# Flags that name files or do not affect the numbers.
NOT_PROTOCOL = (
    *("encoder", "pretrained_weights", "output_dir", "dry_run", "features_dir"),
    *("classifier_fpath", "val_class_mapping_fpath", "test_class_mapping_fpaths"),
)
SILENCE_LIMIT_S = 900.0  # one process may compute alone for four times as long, see `process_group`


def evaluation_parser(
    prog: str, description: str | None, batch_size: int, *, num_workers: int = 5, many_encoders: bool = False
) -> argparse.ArgumentParser:
    """Returns a parser with the flags of every evaluation, named as in DINOv2; `encoder_of` reads the encoder's.

    Args:
        batch_size, num_workers: defaults.
        many_encoders: `--encoder` takes a list.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.set_defaults(encoder=None, pretrained_weights=None)  # before the flags, so that the help shows no default
    encoder = parser.add_mutually_exclusive_group(required=True)
    encoder.add_argument(
        "--encoder",
        nargs="+" if many_encoders else None,
        default=argparse.SUPPRESS,
        metavar="SOURCE",
        help="run folder, teacher checkpoint or weights file, timm:NAME, hf:NAME, hub:REPO:NAME, random:ARCH, or "
        "random: before any of these",
    )
    encoder.add_argument(
        "--pretrained-weights",
        default=argparse.SUPPRESS,
        metavar="PATH",
        help="--encoder under DINOv2's name: run folder, teacher checkpoint or weights file",
    )
    parser.add_argument("--config-file", metavar="YAML", help="config of a checkpoint that carries none")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="folder of the results; None: the folder of the weights"
    )
    parser.add_argument("--train-dataset", default="ImageNet:split=TRAIN", metavar="DATA", help="data string")
    parser.add_argument("--val-dataset", default="ImageNet:split=VAL", metavar="DATA", help="data string")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images in one forward of one process")
    parser.add_argument(
        "--num-workers", type=not_negative, default=num_workers, help="processes that read images; 0: this one"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if any")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast of the backbone")
    parser.add_argument(
        "--features-dir",
        type=Path,
        metavar="DIR",
        help="read features from this folder, or write them, to share them with other evaluations; None: do not share",
    )
    parser.add_argument("--dry-run", action="store_true", help="check weights, data and flags, and exit")
    return parser


def add_subset_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that choose which images of the datasets to use."""
    parser.add_argument(
        "--max-images", type=positive, help="images of each dataset, the first of a fixed shuffle; None: all"
    )
    parser.add_argument(
        "--n-per-class", type=int, default=-1, metavar="N", help="training images of each class, at random; -1: all"
    )
    parser.add_argument("--seed", type=not_negative, default=0, help="seed of everything that is random")


def encoder_of(args: argparse.Namespace) -> Any:
    """Returns the value of `--encoder` or `--pretrained-weights`; with `many_encoders` the former is a list."""
    return args.pretrained_weights if args.encoder is None else args.encoder


@contextmanager
def evaluation_processes(args: argparse.Namespace) -> Iterator[torch.device]:
    """Joins the processes of a launcher, if any, and yields the device of this one.

    The main process logs to the terminal. A dry run uses the CPU, since it also runs where a job is submitted.
    """
    launch = find_launch()
    device = pick_device("cpu" if args.dry_run else args.device, launch.local_rank)
    with (
        stops_raise("run the same command to start over"),
        process_group(launch, device, SILENCE_LIMIT_S),
        lost_workers_explained(),
    ):
        setup_logging()
        yield device


def goes_on(args: argparse.Namespace, folder: Path) -> bool:
    """Returns whether to measure, which a dry run does not; all processes must call it.

    Raises:
        OSError: `folder` cannot be written (not checked in a dry run).
    """
    if args.dry_run:
        logger.info("dry run: encoder, data and flags can be used")
        return False
    from_main_process(lambda: check_writable(folder))
    return True


def extraction_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the keyword arguments of `FeatureExtractor` that every evaluation has flags for."""
    return {
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "half_precision": args.precision == "bf16",
    }


def not_negative(text: str) -> int:
    """Parses a flag that takes a whole number of at least 0."""
    return _whole_number(text, smallest=0)


def positive(text: str) -> int:
    """Parses a flag that takes a whole number of at least 1."""
    return _whole_number(text, smallest=1)


def _whole_number(text: str, smallest: int) -> int:
    try:
        value = int(text)
    except ValueError:
        several = "; separate several by spaces" if "," in text else ""
        raise argparse.ArgumentTypeError(f"must be a whole number, got {text!r}{several}") from None
    if value < smallest:
        raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {value}")
    return value


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table: columns as wide as their longest cell, the first aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    )


def accuracy_table(accuracies: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, str]) -> str:
    """Formats accuracies from `ClassHits.summary`, one row for each set of images, by the metric of that set.

    For per_class_accuracy the row shows the mean.
    """
    rows = []
    for name, found in accuracies.items():
        shown = "mean_accuracy" if metrics[name] == "mean_accuracy" else "mean_per_class_accuracy"
        tops = (f"{found[shown][top]:.2f}" if top in found[shown] else "" for top in ("top1", "top5"))
        rows.append([name, shown, *tops])
    return format_table(["images", "metric", "top-1 %", "top-5 %"], rows)


def protocol_of(args: argparse.Namespace, device: torch.device, started: float) -> dict[str, Any]:
    """Returns the protocol for a results file: flags except those for files, machine, processes and time taken.

    Args:
        started: `time.perf_counter()` at the start.
    """
    flags = {name: value for name, value in vars(args).items() if name not in NOT_PROTOCOL}
    seconds = round(time.perf_counter() - started, 1)
    return {
        **flags,
        "device": str(device),
        "processes": get_world_size(),
        "environment": describe_run(device),
        "seconds": seconds,
    }
