"""Reads run folders with the results of training and evaluations."""

import io
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dinov2_eq.config.schema import default_config
from dinov2_eq.config.yaml_files import read_yaml
from dinov2_eq.files import as_written, check_types, read_bytes, read_json

# Okabe and Ito's order, shifted to mid tones that are visible on white and on near black.
COLORS = ("#2b7bba", "#e07b1a", "#2a9d78", "#c4579a", "#8a6fd1", "#a8842c", "#4fa8d8", "#c8473f")

# The settings that a report uses.
SETTINGS = {
    "equivariance": ("enabled", "loss_weight", "transform", "border", "decoder", "num_intermediates"),
    "student": ("arch", "patch_size"),
    "optim": ("steps",),
    "crops": ("global_crops_size",),
    "train": ("dataset_path", "seed"),
}
BORDERS = ("none", "canvas", "masked", "zeros")  # in the order of how much they reveal about theta
FAINT_BORDERS = ("masked", "zeros")
TOKENS = {
    "cls": "class token",
    "mean": "mean patch token",
    "both": "class and mean patch token",
    "grid2": "mean patch tokens of the quarters",
    "equi": "equivariant half of the mean patch token",
    "equi_grid2": "equivariant half of the quarters",
}

# The arrays of a samples file, with their number of dimensions.
DIMENSIONS = {
    **dict.fromkeys(("anchor_view", "base_view", "transformed_view"), 4),
    **dict.fromkeys(("intermediate_targets", "reconstructions"), 5),
    **{"fractions": 1, "theta": 2, "components": 1},
}

EXPECTED = """\
  config.yaml                                    the resolved config (a run folder must have it)
  training_metrics.jsonl                         loss curves and online k-NN
  samples/step_<step>.npz                        views, targets and reconstructions
  eval/training_<step>/teacher_checkpoint.pth    the encoder for the feature maps
  results_eval_knn.json                          from `dinov2-eq eval knn`
  results_eval_equivariance.json                 from `dinov2-eq eval equivariance`"""


@dataclass(frozen=True)
class Snapshot:
    """The content of one `samples/step_<step>.npz`, in uint8 RGB; `reconstructions` is None without decoders."""

    step: int
    anchor_view: np.ndarray  # [R, H, W, 3]
    base_view: np.ndarray  # [R, H, W, 3]
    transformed_view: np.ndarray  # [R, H, W, 3]
    intermediate_targets: np.ndarray  # [K, R, H, W, 3]
    reconstructions: np.ndarray | None  # [K, R, H, W, 3]
    fractions: np.ndarray  # [K]
    theta: np.ndarray  # [R, P]
    components: np.ndarray  # [P] names of the parameters in theta, empty if the file does not contain them

    def same_images(self, other: "Snapshot") -> bool:
        """Whether both show the same images and transforms, so that their reconstructions can be compared."""
        return np.array_equal(self.base_view, other.base_view) and np.array_equal(
            self.transformed_view, other.transformed_view
        )

    def psnr(self) -> float:
        """Peak signal-to-noise ratio in dB of the reconstructions against the targets, over all images and K."""
        error = self.reconstructions.astype(np.float64) - self.intermediate_targets
        return float(10 * np.log10(255**2 / max(np.mean(error**2), 1e-12)))


@dataclass(frozen=True)
class Run:
    """A run folder; whatever it lacks is empty or None."""

    folder: Path
    name: str  # path from the common folder of all runs in the report
    letter: str
    color: str  # "#rrggbb", the same wherever the run appears
    config: dict[str, Any]
    metrics: list[dict[str, float]]  # one dict per step, ascending
    snapshots: list[Path]  # samples/step_*.npz, ascending
    teacher_checkpoint: Path | None  # the newest one
    knn: dict[str, Any] | None
    equivariance: dict[str, Any] | None

    @property
    def reconstructs(self) -> bool:
        return self.config["equivariance"]["enabled"] and self.config["equivariance"]["loss_weight"] > 0

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of one logged quantity, both [n]; n = 0 if the run never logged it."""
        points = [(line["step"], line[key]) for line in self.metrics if key in line]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.int64), np.array(values, dtype=np.float64)

    def accuracies(self) -> dict[str, float]:
        """k-NN accuracies in per cent by protocol, such as "full, k = 20, top-1"; the first is the main one."""
        if self.knn is None:
            return {}
        return {
            f"{share}, k = {k}, {metric.replace('top', 'top-')}": value
            for share, by_k in self.knn["results"].items()
            for k, accuracies in by_k.items()
            for metric, value in accuracies.items()
        }

    def tasks(self) -> list[str]:
        """Names of the transforms that were predicted."""
        rows = self.equivariance["rows"] if self.equivariance else []
        return list(dict.fromkeys(row["task"] for row in rows))

    def r2_rows(self, task: str, border: str, encoder: str | None = None) -> list[dict[str, Any]]:
        """Results of one transform at one border; `encoder` is "trained" or "random-init", None for both."""
        rows = self.equivariance["rows"] if self.equivariance else []
        return [
            row for row in rows if (row["task"], row["border"]) == (task, border) and encoder in (None, row["encoder"])
        ]

    def border_free_r2(self, task: str, encoder: str = "trained") -> dict[str, float]:
        """R2 of an encoder where all pixels are real, by tokens; of several heads the first."""
        found: dict[str, float] = {}
        for row in _rows_with_variants(self.equivariance) if self.equivariance else ():
            if row["task"] == task and row["encoder"] == encoder and row["border"] not in FAINT_BORDERS:
                found.setdefault(row["tokens"], row["r2_pooled"])
        return found


def r2_label(task: str, tokens: str) -> str:
    """Names an R2 in a table."""
    return f"R\u00b2 of {task.replace('_', ' ')}, {TOKENS.get(tokens, tokens)}"


def all_tasks(runs: Sequence[Run]) -> list[str]:
    """Names of the transforms that were predicted for any of the runs."""
    return list(dict.fromkeys(task for run in runs for task in run.tasks()))


def load_runs(folders: Sequence[Path]) -> list[Run]:
    """Reads run folders in the given order, and gives each a letter and a colour.

    Raises:
        ValueError: a folder is not a run or is given twice, or there are more runs than colours.
    """
    if not 1 <= len(folders) <= len(COLORS):
        raise ValueError(f"A report shows 1 to {len(COLORS)} runs, but {len(folders)} were given. Omit some.")
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"A run folder is given twice: {', '.join(map(str, folders))}. Name each once.")
    for folder in resolved:
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"{folder} is not a run folder: it has no config.yaml. A report reads:\n{EXPECTED}")
    parent = Path(os.path.commonpath([folder.parent for folder in resolved]))
    return [
        _load_run(folder, folder.relative_to(parent).as_posix(), chr(ord("A") + i), COLORS[i])
        for i, folder in enumerate(resolved)
    ]


def load_snapshot(path: Path) -> Snapshot:
    """Reads a samples file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it was cut off, or arrays are missing; names them.
    """
    raw = read_bytes(path)
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
            contents = {name: arrays[name] for name in arrays.files if name in DIMENSIONS}
    except Exception as error:  # damaged bytes may raise nearly anything
        raise ValueError(
            f"{path} is not a samples file, or it was cut off while it was written or copied ({error}). Remove it"
        ) from None
    if missing := DIMENSIONS.keys() - {"reconstructions", "components"} - contents.keys():
        raise ValueError(f"{path} lacks the arrays {sorted(missing)}; it was not written by this trainer's sampling.")
    for name, array in contents.items():
        if array.ndim != DIMENSIONS[name]:
            raise ValueError(f"{path}: {name} has {array.ndim} dimensions, expected {DIMENSIONS[name]}.")
    absent = {"reconstructions": None, "components": np.full(contents["theta"].shape[1], "")}
    return Snapshot(**absent | contents, step=_step_in(path.stem))


def _load_run(folder: Path, name: str, letter: str, color: str) -> Run:
    checkpoints = folder.glob("eval/training_*/teacher_checkpoint.pth")
    return Run(
        folder=folder,
        name=name,
        letter=letter,
        color=color,
        config=_read_config(folder / "config.yaml"),
        metrics=read_metrics(folder / "training_metrics.jsonl"),
        snapshots=sorted(folder.glob("samples/step_*.npz"), key=lambda path: _step_in(path.stem)),
        teacher_checkpoint=max(checkpoints, key=lambda path: _step_in(path.parent.name), default=None),
        knn=_read_results(folder, "knn", _check_accuracies),
        equivariance=_read_results(folder, "equivariance", _check_scores),
    )


def _read_config(path: Path) -> dict[str, Any]:
    config = read_yaml(path)
    lacking = [name for name in (*SETTINGS, "evaluation") if not isinstance(config.get(name), dict)]
    if lacking:
        raise ValueError(
            f"{path} has no section {', '.join(lacking)}. A report needs the resolved config that training writes to "
            "its output folder, not a recipe."
        )
    for section, keys in SETTINGS.items():
        for key in keys:
            value, usual = config[section].get(key), getattr(getattr(default_config(), section), key)
            if not isinstance(value, (int, float) if isinstance(usual, float) else type(usual)):
                raise ValueError(
                    f"{path}: {section}.{key}={value!r} is not of type {type(usual).__name__}, as training writes it."
                )
    return config


def results_path(folder: Path, evaluation: str) -> Path:
    """Where a run has the results of an evaluation: beside its config, or in a folder of the evaluation's name."""
    name = f"results_eval_{evaluation}.json"
    own = folder / evaluation / name  # where `dinov2-eq sweep` puts it
    return own if own.is_file() else folder / name


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads the lines of a metrics file, ordered by step; [] if there is no file.

    A resumed run may repeat steps; then the later line is used. An incomplete last line is ignored.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not as training writes it; names it.
    """
    if not path.is_file():
        return []
    by_step: dict[int, dict[str, float]] = {}
    complete_lines = read_bytes(path).split(b"\n")[:-1]
    for number, line in enumerate(complete_lines, start=1):
        try:
            values = json.loads(line)
            step = int(values["step"])
            check_types(values.values(), int | float)
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError) as error:
            raise ValueError(
                f"{path}, line {number}: not a JSON object with a `step` and other numbers ({error}): {line[:80]!r}"
            ) from None
        by_step[step] = by_step.get(step, {}) | values
    return [by_step[step] for step in sorted(by_step)]


def _read_results(folder: Path, evaluation: str, check: Callable[[dict[str, Any]], None]) -> dict[str, Any] | None:
    """Reads the results of an evaluation; None if there are none. Raises ValueError if `check` fails."""
    path = results_path(folder, evaluation)
    if not path.is_file():
        return None
    results = read_json(path)
    with as_written(path):
        check(results)
    return results


def _check_accuracies(results: dict[str, Any]) -> None:
    check_types([results["protocol"]["num_val_images"]], int)
    for by_k in results["results"].values():
        for accuracies in by_k.values():
            check_types(accuracies.values(), int | float)


def _check_scores(results: dict[str, Any]) -> None:
    for row in _rows_with_variants(results):
        check_types((row["task"], row["border"], row["encoder"], row["tokens"]), str)
        check_types((row["r2_pooled"], row["r2_mean"], *row["r2_components"].values()), int | float)


def _rows_with_variants(results: dict[str, Any]) -> list[dict[str, Any]]:
    """All rows of an equivariance evaluation, those of the main tokens and head first."""
    return [*results["rows"], *results.get("variants", {"rows": []})["rows"]]


def _step_in(name: str) -> int:
    digits = name.rpartition("_")[2]
    if not digits.isdigit():
        raise ValueError(f"{name!r} does not end in a step number, as in step_0000500 or training_500.")
    return int(digits)
