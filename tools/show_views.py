"""Draws a picture of the task: both views, the intermediate targets and their reconstructions."""

import argparse
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from dinov2_eq.report.runs import load_runs, load_snapshot


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/show_views.py", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder with samples/")
    parser.add_argument("--images", type=int, default=3, help="rows of the picture")
    parser.add_argument("--output", type=Path, required=True, help="PNG file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    run = load_runs([args.run])[0]
    if not run.snapshots:
        raise ValueError(f"{args.run} has no samples; train with evaluation.sample_period_steps above 0")
    snapshot = load_snapshot(run.snapshots[-1])
    columns: list[tuple[str, np.ndarray]] = [("anchor v1", snapshot.anchor_view), ("base u", snapshot.base_view)]
    for k, fraction in enumerate(snapshot.fractions):
        share = Fraction(fraction).limit_denominator(100)
        columns.append((f"target, {share} theta", snapshot.intermediate_targets[k]))
        if snapshot.reconstructions is not None:
            columns.append((f"rebuilt, step {snapshot.step}", snapshot.reconstructions[k]))
    columns.append(("transformed", snapshot.transformed_view))

    figure = Figure(figsize=(1.5 * len(columns), 1.6 * args.images), dpi=120, layout="constrained")
    grid = figure.subplots(args.images, len(columns), squeeze=False)
    for axes_row, row in zip(grid, range(args.images), strict=True):
        for axes, (title, images) in zip(axes_row, columns, strict=True):
            axes.imshow(images[row], interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(title, fontsize=9)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    print(args.output)


if __name__ == "__main__":
    main()
