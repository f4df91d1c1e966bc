"""Writes how k-NN accuracy and R2 changed in runs that continued from weights: JSON, a Markdown table and a picture.

    dinov2-eq eval equivariance --encoder START RUN/eval/training_* --no-random-init --output-dir RUN/curve ...
    python tools/curve.py task=RUN disabled=OTHER --output curves.json

k-NN comes from the run itself (evaluation.knn_period_steps). R2 comes from the first command, where START are the
weights that the run started from.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dinov2_eq.evaluation.report_card import MEANS
from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import as_written, read_json
from dinov2_eq.report.figures import as_svg, tidy
from dinov2_eq.report.row_table import markdown
from dinov2_eq.report.runs import Run, load_runs
from dinov2_eq.train.online_knn import KNN_TOP1

MEAN = "mean_border_free"
PANELS = {
    "knn_top1": "k-NN top-1 %",
    MEAN: "mean border-free R2",
    "rotation": "R2, rotation",
    "translation": "R2, shift",
}

Curves = Mapping[str, Sequence[Mapping[str, float]]]  # by run: a row for each step


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/curve.py", description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=named_run, metavar="NAME=RUN", help="run folders with curve/ inside")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; .md and .svg are written next to it")
    return parser


def named_run(text: str) -> tuple[str, Path]:
    """Parses NAME=RUN on the command line."""
    name, separator, folder = text.partition("=")
    if not (name and separator and folder):
        raise argparse.ArgumentTypeError(f"write NAME=RUN, got {text!r}")
    return name, Path(folder)


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    names, folders = zip(*args.runs, strict=True)
    probes = {name: read_probe(folder) for name, folder in args.runs}
    runs = dict(zip(names, load_runs(folders), strict=True))
    curves = {name: curve_of(run, probes[name]) for name, run in runs.items()}
    columns = [column for column in PANELS if all(column in row for rows in curves.values() for row in rows)]
    protocols = {name: probe["protocol"] for name, probe in probes.items()}
    write_results(args.output, {"protocols": protocols, "curves": curves})
    text = table(curves, columns)
    args.output.with_suffix(".md").write_text(text, encoding="utf-8")
    colors = {name: run.color for name, run in runs.items()}
    args.output.with_suffix(".svg").write_text(draw(curves, columns, colors), encoding="utf-8")
    print(text, end="")


def read_probe(folder: Path) -> dict[str, Any]:
    """Reads the R2 results of a run.

    Raises:
        FileNotFoundError: the run was not probed.
        ValueError: the file is not as the probe writes it.
    """
    path = folder / "curve" / "results_eval_equivariance.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; 'dinov2-eq eval equivariance --output-dir {folder}/curve' makes it"
        )
    probe = read_json(path)
    with as_written(path):
        for name in probe["encoders"]:
            r2_of(probe, name)
    return probe


def curve_of(run: Run, probe: Mapping[str, Any]) -> list[dict[str, float]]:
    """Accuracy and R2 of a run, one row per step, ascending.

    Raises:
        ValueError: there is no step with both k-NN and R2.
    """
    knn = dict(zip(*(values.tolist() for values in run.curve(KNN_TOP1)), strict=True))
    rows = []
    for name, description in probe["encoders"].items():
        # The weights that the run started from have another step count.
        inside = Path(description["checkpoint"]).is_relative_to(run.folder)
        step = description["step"] if inside else 0
        if step in knn:
            rows.append({"step": step, "knn_top1": knn[step], **r2_of(probe, name)})
    if not rows:
        raise ValueError(
            f"{run.folder} has no step with both k-NN and R2: train with evaluation.knn_period_steps, a divisor of "
            "evaluation.eval_period_steps"
        )
    return sorted(rows, key=lambda row: row["step"])


def r2_of(probe: Mapping[str, Any], encoder: str) -> dict[str, float]:
    """Border-free R2 by task, and their mean if all four tasks were probed."""
    rows = [row for row in probe["rows"] if row["encoder"] == encoder and row["border"] in MEANS[MEAN]]
    means = [row for row in probe["summary"] if row["encoder"] == encoder and row["name"] == MEAN]
    return {row.get("task", MEAN): row["r2_pooled"] for row in [*rows, *means]}


def table(curves: Curves, columns: Sequence[str]) -> str:
    """Markdown table with a row for each run and step."""
    lines = []
    for run, rows in curves.items():
        for row in rows:
            numbers = [f"{row[name]:.2f}" if name == "knn_top1" else f"{row[name]:.3f}" for name in columns]
            lines.append([run, str(row["step"]), *numbers])
    return markdown(["run", "step", *(PANELS[name] for name in columns)], lines)


def draw(curves: Curves, columns: Sequence[str], colors: Mapping[str, str]) -> str:
    """Draws an SVG file with a panel for each column and a line for each run."""
    figure = Figure(figsize=(2.6 * len(columns), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        for run, rows in curves.items():
            points = [row["step"] for row in rows], [row[name] for row in rows]
            axes.plot(*points, color=colors[run], marker="o", markersize=3, label=run)
        axes.set_title(PANELS[name], fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        tidy(axes)
    axes.legend(fontsize=8)
    return as_svg(figure)


if __name__ == "__main__":
    main()
