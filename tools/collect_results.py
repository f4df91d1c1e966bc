"""Collects the probes of several runs into one JSON file, and a Markdown table of it beside it."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_eq.report.runs import load_runs

TASKS = ("rotation", "translation", "color_jitter", "blur")
SUMMARY = ("mean_border_free", "mean_masked", "mean_zeros")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/collect_results.py", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with results_eval_knn and _equivariance.json")
    parser.add_argument("--output", type=Path, required=True, help="JSON file; the table goes beside it as .md")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    rows = [row for run in runs for row in run["rows"]]
    protocol = {name: runs[0][name] for name in ("knn_protocol", "equivariance_protocol", "environment")}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**protocol, "rows": rows}, indent=1) + "\n")
    table = args.output.with_suffix(".md")
    table.write_text(markdown(rows) + "\n")
    print(table.read_text(), end="")


def read_run(folder: Path) -> dict[str, Any]:
    """One row for the run, and one for the untrained backbone where the probe has it.

    Raises:
        FileNotFoundError: a probe is missing.
    """
    run = load_runs([folder])[0]
    for probe, results in {"knn": run.knn, "equivariance": run.equivariance}.items():
        if results is None:
            raise FileNotFoundError(f"{folder} has no results_eval_{probe}.json; 'dinov2-eq eval {probe}' writes it")
    task, training = run.config["equivariance"], run.config["train"]
    steps = run.config["optim"]["steps"]
    speeds = run.curve("images_per_second")[1]
    row = {
        "run": folder.name,
        "seed": training["seed"],
        "steps": steps,
        "images_seen": steps * training["batch_size_per_gpu"] * training["accumulation_steps"],
        "enabled": task["enabled"],
        **({key: task[key] for key in ("loss_weight", "transform", "border", "decoder")} if task["enabled"] else {}),
        "knn_top1": {k: accuracy["top1"] for k, accuracy in run.knn["results"]["full"].items()},
        "images_per_second": float(np.median(speeds)),
        **scores_of(run.equivariance, "trained"),
    }
    rows = [row]
    if any(entry["encoder"] == "random-init" for entry in run.equivariance["rows"]):
        rows.insert(0, {"run": "random init", **scores_of(run.equivariance, "random-init")})
    return {
        "rows": rows,
        "knn_protocol": run.knn["protocol"],
        "equivariance_protocol": run.equivariance["protocol"],
        "environment": json.loads((folder / "environment.json").read_text()),
    }


def scores_of(equivariance: dict[str, Any], encoder: str) -> dict[str, Any]:
    """R2 (pooled and mean over components) by task and border, and the means over the tasks."""
    rows = [row for row in equivariance["rows"] if row["encoder"] == encoder]
    return {
        "r2": {
            f"{row['task']}/{row['border']}": {
                "pooled": row["r2_pooled"],
                "mean": row["r2_mean"],
                "components": row["r2_components"],
            }
            for row in rows
        },
        "r2_means": {row["name"]: row["r2_pooled"] for row in equivariance["summary"] if row["encoder"] == encoder},
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Pooled R2: rotation and translation as border-free / masked / zeros, colour and blur as unmasked / masked."""
    header = ["run", "rotation", "translation", "colour", "blur", "mean border-free", "mean masked", "k-NN %"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        cells = [row["run"]]
        for task in TASKS:
            borders = [border for border in ("canvas", "none", "masked", "zeros") if f"{task}/{border}" in row["r2"]]
            cells.append(" / ".join(f"{row['r2'][f'{task}/{border}']['pooled']:.2f}" for border in borders))
        cells += [f"{row['r2_means'][name]:.3f}" for name in SUMMARY[:2]]
        accuracies = row.get("knn_top1")
        cells.append(f"{accuracies['20']:.1f}" if accuracies else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
