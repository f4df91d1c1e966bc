"""Collects the probe results of several runs into one JSON file, with a Markdown table and a plot next to it.

The plot shows R2 against k-NN accuracy: what a form of the task brings, and what it costs.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dinov2_eq.evaluation.results import write_results
from dinov2_eq.files import as_written, check_types, read_json
from dinov2_eq.report.figures import as_svg, tidy
from dinov2_eq.report.rows import (
    MEANS,
    PROBES,
    TASKS,
    check_results,
    results_of,
    row_of,
    untrained_rows,
    without_folders,
)
from dinov2_eq.report.runs import Run, load_runs

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
        check_probed(run)
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


def check_probed(run: Run) -> None:
    """Raises FileNotFoundError if a probe was not run, and ValueError if its results are not as it writes them."""
    for probe in PROBES:
        if results_of(run, probe) is None:
            raise FileNotFoundError(
                f"{run.folder} has no results_eval_{probe}.json; 'dinov2-eq eval {probe}' writes it"
            )
        check_results(run, probe)


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
