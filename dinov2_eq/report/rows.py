"""One row for each run: its settings and results, for tables and plots that compare runs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_eq.data.datasets.data_string import parse_data_string
from dinov2_eq.files import as_written, check_types, read_json
from dinov2_eq.models import ARCHS
from dinov2_eq.report.runs import FAINT_BORDERS, Run, results_path

TASKS = ("rotation", "translation", "color_jitter", "blur")
MEANS = ("mean_border_free", "mean_masked")
PROBES = ("knn", "equivariance")
QUARTERS = "grid2"  # tokens of a probe that reads the mean patch tokens of the four quarters
SHOWN_SETTINGS = ("transform", "border", "view", "invariant_projection", "decoder", "loss_weight")


def results_of(run: Run, probe: str) -> dict[str, Any] | None:
    """The results of a probe of `PROBES`; None if the run has none."""
    return {"knn": run.knn, "equivariance": run.equivariance}[probe]


def check_results(run: Run, probe: str) -> None:
    """Raises ValueError if the results of a probe are not as it writes them; without results nothing is wrong."""
    if results_of(run, probe) is None:
        return
    with as_written(results_path(run.folder, probe)):
        for key in ("train_dataset", "val_dataset"):
            without_folders(results_of(run, probe)["protocol"][key])
        if probe == "knn":
            accuracies_of(run)
        else:
            check_types([run.equivariance["encoder"]["step"]], int)
            scores_of(run, "trained")


def row_of(run: Run) -> dict[str, Any]:
    """Settings and results of a run, as stored in JSON files; without what was not measured."""
    task, training = run.config["equivariance"], run.config["train"]
    path = run.folder / "environment.json"
    with as_written(path):
        environment = read_json(path)
        device, commit = environment["device"], environment["commit"]
    batch_size = training["batch_size_per_gpu"] * training["accumulation_steps"]
    steps = run.equivariance["encoder"]["step"] if run.equivariance else run.config["optim"]["steps"]
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
        **({"knn_top1": accuracies_of(run)} if run.knn else {}),
        **(scores_of(run, "trained") if run.equivariance else {}),
    }


def untrained_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Rows of untrained networks, one for each architecture that was probed untrained."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        if run.equivariance is None:
            continue
        scores, backbone = scores_of(run, "random-init"), backbone_of(run)
        if scores["r2"] and not any(row.items() >= backbone.items() for row in rows):
            rows.append({"run": "random init", "kind": "untrained", **backbone, **scores})
    return rows


def backbone_of(run: Run) -> dict[str, Any]:
    student = run.config["student"]
    arch = student["arch"]
    return {
        "arch": arch,
        "depth": student["depth"] or (ARCHS[arch].depth if arch in ARCHS else None),
        "patch_size": student["patch_size"],
        "image_size": run.config["crops"]["global_crops_size"],
    }


def accuracies_of(run: Run) -> dict[str, float]:
    """k-NN top-1 in per cent on all training images, by k."""
    return {k: accuracy["top1"] for k, accuracy in run.knn["results"].get("full", {}).items()}


def scores_of(run: Run, encoder: str) -> dict[str, Any]:
    """R2 by task and border (pooled, and by component), the means over the tasks, and R2 from the quarters."""
    rows = [row for row in run.equivariance["rows"] if row["encoder"] == encoder]
    quarters = {
        task: found[QUARTERS] for task in run.tasks() if QUARTERS in (found := run.border_free_r2(task, encoder))
    }
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
        **({"r2_quarters": {"by_task": quarters, "mean": float(np.mean([*quarters.values()]))}} if quarters else {}),
    }


def headline(row: Mapping[str, Any]) -> dict[str, float]:
    """The few numbers of a row that a table has room for: border-free R2, their means, and k-NN at the largest k."""
    found = {
        f"R2 {task.replace('_', ' ')}": score["pooled"]
        for task, _, border, score in ((*key.partition("/"), score) for key, score in row.get("r2", {}).items())
        if border not in FAINT_BORDERS
    }
    if "mean_border_free" in row.get("r2_means", {}):
        found["R2 mean"] = row["r2_means"]["mean_border_free"]
    if "r2_quarters" in row:
        found["R2 mean, quarters"] = row["r2_quarters"]["mean"]
    if accuracies := row.get("knn_top1"):
        k = max(accuracies, key=int)
        found[f"{k}-NN %"] = accuracies[k]
    return found


def without_folders(data_string: str) -> str:
    """Shortens each path in a data string to its last part, because folders mean nothing on other machines."""
    name, options = parse_data_string(data_string)
    return ":".join([name, *(f"{key}={Path(value).name}" for key, value in options.items())])
