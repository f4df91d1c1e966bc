"""How k-NN accuracy and R2 moved in runs that continued from weights: JSON, a Markdown table and a picture.

    dinov2-eq eval equivariance --encoder START RUN/eval/training_* --no-random-init --output-dir RUN/curve ...
    python tools/curve.py task=RUN disabled=OTHER --output docs/results/continued.json

k-NN is the run's own (evaluation.knn_period_steps). R2 comes from the first command, whose START is what the run
started from.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dinov2_eq.evaluation.results import write_results
from dinov2_eq.report.runs import COLORS

KNN, MEAN = "eval/knn_top1", "mean_border_free"
BORDER_FREE = ("canvas", "none")
PANELS = {
    "knn_top1": "k-NN top-1 %",
    MEAN: "mean border-free R2",
    "rotation": "R2, rotation",
    "translation": "R2, shift",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/curve.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=named_run, metavar="NAME=RUN", help="run folders with curve/ inside")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; .md and .svg go beside it")
    return parser


def named_run(text: str) -> tuple[str, Path]:
    """Type of a run on the command line."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"write NAME=RUN, got {text!r}")
    return name, Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    curves = {name: curve_of(folder) for name, folder in args.runs}
    protocols = {name: json.loads(results_of(folder).read_text())["protocol"] for name, folder in args.runs}
    write_results(args.output, {"protocols": protocols, "curves": curves})
    args.output.with_suffix(".md").write_text(table(curves), encoding="utf-8")
    draw(curves, args.output.with_suffix(".svg"))
    print(table(curves), end="")


def curve_of(folder: Path) -> list[dict[str, float]]:
    """The numbers of a run by step, ascending.

    Raises:
        FileNotFoundError: the run was not probed.
        ValueError: there is no step with both k-NN and R2.
    """
    results = json.loads(results_of(folder).read_text())
    knn = {}
    for line in (folder / "training_metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if KNN in entry:
            knn[entry["step"]] = entry[KNN]
    rows = []
    for name, description in results["encoders"].items():
        # What the run started from has steps of its own.
        inside = Path(description["checkpoint"]).is_relative_to(folder.resolve())
        step = description["step"] if inside else 0
        if step in knn:
            rows.append({"step": step, "knn_top1": knn[step], **r2_of(results, name)})
    if not rows:
        raise ValueError(
            f"{folder} has no step with both k-NN and R2: train with evaluation.knn_period_steps, a divisor of "
            "evaluation.eval_period_steps"
        )
    return sorted(rows, key=lambda row: row["step"])


def r2_of(results: Mapping[str, Any], encoder: str) -> dict[str, float]:
    """R2 by task without borders, and their mean where all four tasks were probed."""
    rows = [row for row in results["rows"] if row["encoder"] == encoder and row["border"] in BORDER_FREE]
    means = [row for row in results["summary"] if row["encoder"] == encoder and row["name"] == MEAN]
    return {row.get("task", MEAN): row["r2_pooled"] for row in [*rows, *means]}


def results_of(folder: Path) -> Path:
    path = folder / "curve" / "results_eval_equivariance.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; 'dinov2-eq eval equivariance --output-dir {folder}/curve' makes it"
        )
    return path


def table(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    columns = [name for name in PANELS if all(name in row for rows in curves.values() for row in rows)]
    lines = [["run", "step", *(PANELS[name] for name in columns)], ["---", *["---:"] * (len(columns) + 1)]]
    for run, rows in curves.items():
        for row in rows:
            numbers = [f"{row[name]:.2f}" if name == "knn_top1" else f"{row[name]:.3f}" for name in columns]
            lines.append([run, str(row["step"]), *numbers])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """One panel for each number, one line for each run."""
    shown = [name for name in PANELS if all(name in row for rows in curves.values() for row in rows)]
    figure = Figure(figsize=(2.6 * len(shown), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for color, (run, rows) in zip(COLORS, curves.items(), strict=False):
            axes.plot(
                [row["step"] for row in rows],
                [row[name] for row in rows],
                color=color,
                marker="o",
                markersize=3,
                label=run,
            )
        axes.set_title(PANELS[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(linewidth=0.4)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
