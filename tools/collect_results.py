"""Collects the probe results of several runs into one JSON file, with a Markdown table and a plot next to it.

The plot shows R2 against k-NN accuracy: what a form of the task brings, and what it costs.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dinov2_eq.data.datasets.data_string import parse_data_string
from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import as_written, check_types, read_json
from dinov2_eq.models import ARCHS
from dinov2_eq.report.figures import as_svg, tidy
from dinov2_eq.report.runs import Run, load_runs

TASKS = ("rotation", "translation", "color_jitter", "blur")
MEANS = ("mean_border_free", "mean_masked")
PROBES = ("knn", "equivariance")
SHOWN_SETTINGS = ("transform", "border", "view", "invariant_projection", "decoder", "loss_weight")
# Entries of the protocol that may differ between comparable probes. For nb_knn, the rows give the accuracy at each k.
NOT_PROTOCOL = {"seconds", "environment", "config_file", "num_workers", "random_init", "nb_knn", "notices", "processes"}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/collect_results.py", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "runs",
        nargs="+",
        type=Path,
        help="run folders with results_eval_knn and _equivariance.json, or JSON files that this tool has written",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file; .md and .svg are written next to it")
    parser.add_argument("--k", type=int, help="neighbours for the k-NN column (default: the largest k of all runs)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    earlier = {str(path): read_collected(path) for path in args.runs if path.is_file()}
    runs = [load_runs([folder])[0] for folder in args.runs if not folder.is_file()]
    for run in runs:
        for probe in PROBES:
            check_results(run, probe)
    protocols = {probe: common_protocol(earlier, runs, probe) for probe in PROBES}
    rows = [row for collected in earlier.values() for row in collected["rows"]]
    rows = unique([*rows, *untrained_rows(runs), *map(row_of, runs)])
    k = choose_k(rows, args.k)
    write_results(args.output, {**{f"{probe}_protocol": protocols[probe] for probe in PROBES}, "rows": rows})
    text = markdown(rows, k)
    args.output.with_suffix(".md").write_text(f"{text}\n", encoding="utf-8")
    args.output.with_suffix(".svg").write_text(draw(rows, k), encoding="utf-8")
    print(text)


def read_collected(path: Path) -> dict[str, Any]:
    """Reads a file that this tool has written.

    Raises:
        ValueError: the file is not as this tool writes it.
    """
    collected = read_json(path)
    with as_written(path):
        for probe in PROBES:
            check_types([collected[f"{probe}_protocol"]], dict)
        check_types([collected["rows"]], list)
        for row in collected["rows"]:
            check_types([row["run"], row["kind"]], str)
            check_types([row["r2"], row["r2_means"], row.get("knn_top1", {})], dict)
            check_types([score["pooled"] for score in row["r2"].values()], (int, float))
            check_types([*row["r2_means"].values(), *row.get("knn_top1", {}).values()], (int, float))
            if not all(k.isdigit() for k in row.get("knn_top1", {})):
                raise TypeError(f"numbers of neighbours {[*row['knn_top1']]}")
    return collected


def unique(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without repetitions; raises ValueError if two different runs have one name."""
    found: dict[str, dict[str, Any]] = {}
    kept = []
    for row in rows:
        if row["kind"] != "untrained" and found.setdefault(row["run"], row) != row:
            raise ValueError(
                f"There are two different runs of the name {row['run']}: give each once, and rename the folder of one"
            )
        if row not in kept:
            kept.append(row)
    return kept


def results_of(run: Run, probe: str) -> dict[str, Any] | None:
    """The results of a probe of `PROBES`; None if the run has none."""
    return {"knn": run.knn, "equivariance": run.equivariance}[probe]


def check_results(run: Run, probe: str) -> None:
    """Checks the results of a probe.

    Raises:
        FileNotFoundError: the run was not probed.
        ValueError: the file is not as the probe writes it.
    """
    path = run.folder / f"results_eval_{probe}.json"
    if results_of(run, probe) is None:
        raise FileNotFoundError(f"{run.folder} has no {path.name}; 'dinov2-eq eval {probe}' writes it")
    with as_written(path):
        protocol_of(run, probe)
        if probe == "knn":
            accuracies_of(run)
        else:
            check_types([run.equivariance["encoder"]["step"]], int)
            scores_of(run, "trained")


def protocol_of(run: Run, probe: str) -> dict[str, Any]:
    """The parts of the protocol that must agree between runs."""
    protocol = {key: value for key, value in results_of(run, probe)["protocol"].items() if key not in NOT_PROTOCOL}
    return protocol | {key: without_folders(protocol[key]) for key in ("train_dataset", "val_dataset")}


def common_protocol(earlier: Mapping[str, dict[str, Any]], runs: Sequence[Run], probe: str) -> dict[str, Any]:
    """The protocol that all runs, and those of earlier collections (by path), were probed with.

    Raises:
        ValueError: the protocol of a run differs from that of the first.
    """
    protocols = [(path, collected[f"{probe}_protocol"]) for path, collected in earlier.items()]
    protocols += [(str(run.folder), protocol_of(run, probe)) for run in runs]
    (first, expected), *others = protocols
    for name, protocol in others:
        if different := [key for key in expected | protocol if expected.get(key) != protocol.get(key)]:
            differences = "; ".join(f"{key} is {protocol.get(key)!r}, not {expected.get(key)!r}" for key in different)
            raise ValueError(
                f"The {probe} results of {name} cannot be compared with those of {first}: {differences}. Repeat "
                f"'dinov2-eq eval {probe}' with the same flags for all runs"
            )
    return expected


def choose_k(rows: Sequence[dict[str, Any]], wanted: int | None) -> str:
    """The wanted k, or else the largest one that all runs have; raises ValueError if there is none."""
    by_run = {row["run"]: set(map(int, row["knn_top1"])) for row in rows if "knn_top1" in row}
    if not by_run:
        raise ValueError("There is no run with a k-NN accuracy; give at least one run folder")
    common = set.intersection(*by_run.values())
    usable = common if wanted is None else common & {wanted}
    if not usable:
        raise ValueError(
            f"Not all runs have a k-NN accuracy at {'one k' if wanted is None else f'k = {wanted}'} on all training "
            f"images: {'; '.join(f'{name} has {sorted(ks)}' for name, ks in by_run.items())}. Choose --k, or repeat "
            "'dinov2-eq eval knn' with the same --nb_knn for all runs"
        )
    return str(max(usable))


def row_of(run: Run) -> dict[str, Any]:
    """Settings and results of a run, as stored in the JSON file."""
    task, training = run.config["equivariance"], run.config["train"]
    path = run.folder / "environment.json"
    with as_written(path):
        environment = read_json(path)
        device, commit = environment["device"], environment["commit"]
    batch_size = training["batch_size_per_gpu"] * training["accumulation_steps"]
    steps = run.equivariance["encoder"]["step"]
    speeds = run.curve("images_per_second")[1]
    kind = "task" if run.reconstructs else "control, λ = 0" if task["enabled"] else "base method"
    return {
        "run": run.folder.name,
        "kind": kind,
        **({key: task[key] for key in SHOWN_SETTINGS if key in task} if task["enabled"] else {}),
        "seed": training["seed"],
        "steps": steps,
        "batch_size": batch_size,
        "images_seen": steps * batch_size,
        "data": without_folders(training["dataset_path"]),
        **backbone_of(run),
        "device": device,
        "commit": commit,
        "images_per_second": float(np.median(speeds)) if len(speeds) else None,
        "knn_top1": accuracies_of(run),
        **scores_of(run, "trained"),
    }


def untrained_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of untrained networks, one for each architecture that was probed untrained."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        scores, backbone = scores_of(run, "random-init"), backbone_of(run)
        if scores["r2"] and not any(row.items() >= backbone.items() for row in rows):
            rows.append({"run": "random init", "kind": "untrained", **backbone, **scores})
    return rows


def backbone_of(run: Run) -> dict[str, Any]:
    student = run.config["student"]
    return {
        "arch": student["arch"],
        "depth": student["depth"] or ARCHS[student["arch"]].depth,
        "patch_size": student["patch_size"],
        "image_size": run.config["crops"]["global_crops_size"],
    }


def accuracies_of(run: Run) -> dict[str, float]:
    return {k: accuracy["top1"] for k, accuracy in run.knn["results"].get("full", {}).items()}


def scores_of(run: Run, encoder: str) -> dict[str, Any]:
    """R2 by task and border (pooled, and mean over components), and the means over the tasks."""
    rows = [row for row in run.equivariance["rows"] if row["encoder"] == encoder]
    return {
        "r2": {
            f"{row['task']}/{row['border']}": {
                "pooled": row["r2_pooled"],
                "mean": row["r2_mean"],
                "components": row["r2_components"],
            }
            for row in rows
        },
        "r2_means": {
            row["name"]: float(row["r2_pooled"]) for row in run.equivariance["summary"] if row["encoder"] == encoder
        },
    }


def without_folders(data_string: str) -> str:
    """Shortens each path in a data string to its last part, because folders mean nothing on other machines."""
    name, options = parse_data_string(data_string)
    return ":".join([name, *(f"{key}={Path(value).name}" for key, value in options.items())])


def markdown(rows: Sequence[dict[str, Any]], k: str) -> str:
    """Table of pooled R2: rotation and translation as border-free / masked / zeros, others as unmasked / masked."""
    numbers = ["rotation", "translation", "colour", "blur", "mean border-free", "mean masked", f"{k}-NN %"]
    header = ["run", "kind", *numbers]
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * len(numbers)]
    for row in rows:
        cells = [row["run"], row["kind"]]
        for task in TASKS:
            borders = [border for border in ("canvas", "none", "masked", "zeros") if f"{task}/{border}" in row["r2"]]
            cells.append(" / ".join(f"{row['r2'][f'{task}/{border}']['pooled']:.2f}" for border in borders))
        cells += [f"{row['r2_means'][name]:.3f}" if name in row["r2_means"] else "" for name in MEANS]
        cells.append(f"{row['knn_top1'][k]:.1f}" if "knn_top1" in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: Sequence[dict[str, Any]], k: str) -> str:
    """Draws the mean border-free R2 of all runs against their k-NN accuracy, as SVG."""
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    axes = figure.subplots()
    points = [
        (row["run"], row["kind"], row["knn_top1"][k], row["r2_means"][MEANS[0]])
        for row in rows
        if "knn_top1" in row and MEANS[0] in row["r2_means"]
    ]
    for kind in dict.fromkeys(kind for _, kind, *_ in points):
        x, y = zip(*(place for _, its, *place in points if its == kind), strict=True)
        axes.scatter(x, y, s=24, label=kind)
    for name, _, *place in points:
        axes.annotate(name, place, xytext=(4, 3), textcoords="offset points", fontsize=6)
    axes.margins(x=0.2, y=0.1)  # room for the names
    axes.set_xlabel(f"{k}-NN top-1 %", fontsize=8)
    axes.set_ylabel("mean border-free R2", fontsize=8)
    tidy(axes)
    if points:
        axes.legend(fontsize=8)
    return as_svg(figure)


if __name__ == "__main__":
    main()
