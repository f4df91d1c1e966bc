"""What the evaluation programs have in common: flags, device, the record of the protocol, and the table at the end."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dinov2_eq.logging import describe_run


def evaluation_parser(prog: str, description: str | None, batch_size: int) -> argparse.ArgumentParser:
    """A parser with the flags of every evaluation, named as in DINOv2."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--pretrained-weights",
        required=True,
        default=argparse.SUPPRESS,  # or the help would tell a default
        metavar="PATH",
        help="run folder, whose newest teacher checkpoint is read, or a teacher checkpoint",
    )
    parser.add_argument("--config-file", metavar="YAML", help="config of a checkpoint that carries none")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where the results go; None: the folder of the weights"
    )
    parser.add_argument("--train-dataset", default="ImageNet:split=TRAIN", metavar="DATA", help="data string")
    parser.add_argument("--val-dataset", default="ImageNet:split=VAL", metavar="DATA", help="data string")
    parser.add_argument("--batch-size", type=positive, default=batch_size, help="images in one forward")
    parser.add_argument("--num-workers", type=int, default=5, help="processes that read images; 0: this one")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: the GPU, if any")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast of the backbone")
    parser.add_argument("--dry-run", action="store_true", help="look for weights and data, and exit")
    return parser


def positive(text: str) -> int:
    """Type of a flag that takes a whole number from 1 up."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their longest cell; the first is aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, ["-" * width for width in widths], *rows)
    )


def protocol_of(args: argparse.Namespace, device: torch.device, started: float) -> dict[str, Any]:
    """What a results file says about how it came about: every flag but the paths, the machine, and the time taken.

    Args:
        started: `time.perf_counter()` at the start.
    """
    left_out = ("pretrained_weights", "output_dir", "dry_run")
    flags = {name: value for name, value in vars(args).items() if name not in left_out}
    seconds = round(time.perf_counter() - started, 1)
    return {**flags, "device": str(device), "environment": describe_run(device), "seconds": seconds}
