"""How well frozen features tell the transform that took I to g(I): R2 of its parameters, on held-out images.

--card makes a report card of it, on one HTML page: all transforms and choices of head and tokens, the invariance to
each transform, and k-NN accuracy and retrieval over the angle of rotation.
"""

import argparse
import logging
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dinov2_eq.data.datasets import DataError, ImageDataset, build_dataset
from dinov2_eq.data.labelled import read_labelled
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.distributed import from_main_process, is_main_process
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, positive
from dinov2_eq.evaluation.encoder import Encoder, load_encoder
from dinov2_eq.evaluation.probe_transforms import add_range_flags, build_probe_transform, ranges_of
from dinov2_eq.evaluation.report_card import (
    ANGLES_DEG,
    TASKS,
    Extracted,
    Probes,
    angle_curve,
    cosine_rows,
    score_transforms,
    summarise,
    turned_settings,
    turned_theta,
    upright,
)
from dinov2_eq.evaluation.side_by_side import name_encoders, with_untrained
from dinov2_eq.evaluation.transformed_pairs import Setting, draw_theta, extract_pairs, settings_of
from dinov2_eq.files import replace_text
from dinov2_eq.probes.features import EQUIVARIANT_MODES, MODES
from dinov2_eq.probes.transform_regression import BATCH_SIZE, HEADS, LEARNING_RATE, scale_targets
from dinov2_eq.report import MAX_ENCODERS, render_card

PAGE_NAME = "report_card.html"
# What --card means where nothing else is said. The first head and tokens are those of `rows` and `summary`.
CARD = {
    "tasks": ["rotation", "translation", "se2", "color_jitter", "blur", "crop", "flip"],
    "head": ["mlp", "linear"],
    "tokens": ["both", "cls", "mean", "grid2"],
    "num_seeds": 3,
}
NUM_NEIGHBOURS = 20

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval equivariance", __doc__, batch_size=128, many_encoders=True)
    add = parser.add_argument
    add("--card", action="store_true", help=f"the report card; unless told otherwise, with {described(CARD)}")
    add("--max-train-images", type=positive, default=10000, help="the first so many of a fixed shuffle train the head")
    add("--max-val-images", type=positive, default=2000, help="the first so many of a fixed shuffle are scored")
    add("--draws", type=positive, default=1, help="transforms drawn for each training image")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="names or package.module:ClassName")
    add(
        "--tokens",
        nargs="+",
        choices=[*MODES, *EQUIVARIANT_MODES],
        default=["both"],
        help="cls: class token; mean: of the patch tokens; both; grid2: mean patch tokens of the four quarters; equi, "
        "equi_grid2: the equivariant half of the mean, and of the quarters",
    )
    add("--head", nargs="+", choices=HEADS, default=["mlp"], help="what reads the features")
    add("--hidden-dim", type=positive, default=1024, help="width of the mlp")
    add("--epochs", type=positive, default=50, help="of the head")
    add("--num-seeds", type=positive, default=1, help="heads trained for each number, which is their mean")
    add("--random-init", action=argparse.BooleanOptionalAction, default=True, help="also score the untrained encoder")
    ranges = add_range_flags(parser)
    ranges.add_argument("--min-crop-share", type=float, default=0.2, help="of the area that a crop keeps at least")
    return parser


def described(flags: dict[str, Any]) -> str:
    values = {name: " ".join(value) if isinstance(value, list) else value for name, value in flags.items()}
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in values.items())


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.card:
        parser.set_defaults(**CARD)
        args = parser.parse_args(argv)
    for name in ("tasks", "tokens", "head"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    run(Equivariance, args)


class Split(NamedTuple):
    """The images that train the heads, or those that are scored."""

    dataset: ImageDataset
    indices: np.ndarray  # [N]
    labels: Tensor | None  # [N]; None where there is no k-NN
    theta: dict[str, Tensor]  # [draws, N, P] by task


class Equivariance(Evaluation):
    file_name = "results_eval_equivariance.json"

    def open(self) -> None:
        args = self.args
        if len(self.sources) > 1 and args.output_dir is None:
            raise ValueError("--output-dir is missing: the results of several encoders belong to no folder of theirs")
        self.datasets, self.labels, self.notices = from_main_process(lambda: read_data(args))

    def load(self) -> None:
        encoders = [load_encoder(source, self.args.config_file) for source in self.sources]
        self.encoders = name_encoders(self.sources, encoders)
        self.tasks = build_tasks(self.args)
        self.settings = {
            size: [setting for task, transform in self.tasks.items() for setting in settings_of(task, transform, size)]
            for size in dict.fromkeys(encoder.image_size for encoder in self.encoders.values())
        }

    def measure(self) -> Measured:
        args, device, tasks, started = self.args, self.device, self.tasks, time.perf_counter()
        encoders = with_untrained(self.encoders) if args.random_init else self.encoders
        if args.card and len(encoders) > MAX_ENCODERS:
            raise ValueError(
                f"A card shows up to {MAX_ENCODERS} encoders, got {len(encoders)} with the untrained ones: "
                f"{', '.join(encoders)}. Name fewer, or give --no-random-init"
            )
        for notice in self.notices:
            logger.warning(notice)
        for encoder in encoders.values():
            encoder.backbone.to(device)

        train = make_split("train", self.datasets[0], self.labels[0], args.max_train_images, args.draws, tasks)
        val = make_split("val", self.datasets[1], self.labels[1], args.max_val_images, 1, tasks)
        extracted = {}
        for size, of_size in self.settings.items():
            group = {name: encoder for name, encoder in encoders.items() if encoder.image_size == size}
            extracted |= dict.fromkeys(group, extract(group, of_size, train, val, args, device))
            logger.info("features of %s done, %.0f s", ", ".join(group), time.perf_counter() - started)
        extracted = {name: extracted[name] for name in encoders}

        targets = tuple(
            {task: scale_targets(split.theta[task].flatten(0, 1), tasks[task].low, tasks[task].high) for task in tasks}
            for split in (train, val)
        )
        rows = []
        probes = Probes(args.head, args.tokens, args.num_seeds, args.hidden_dim, args.epochs)
        for found in score_transforms(extracted, targets, probes, device):
            rows += found
            for row in found:
                what = [row[key] for key in ("encoder", "task", "border", "tokens", "head")]
                elapsed = time.perf_counter() - started
                logger.info("%s: R2 %.3f, %.0f s", ", ".join(what), row["r2_pooled"], elapsed)
        headline = {"tokens": args.tokens[0], "head": args.head[0]}
        chosen, others = split_rows(rows, headline)
        summary, other_means = split_rows(summarise(rows), headline)
        measured = {
            "encoder": next(iter(encoders.values())).description,
            "encoders": {name: encoder.description for name, encoder in encoders.items()},
            "rows": chosen,
            "summary": summary,
            "variants": {"rows": others, "summary": other_means},
        }
        if args.card:
            measured["cosines"] = [
                row for name, found in extracted.items() for row in cosine_rows(name, found, args.tokens)
            ]
            measured["angles"] = measure_angles(extracted, train, val, args.tokens, device)
        protocol = {
            "num_train_images": len(train.indices),
            "num_val_images": len(val.indices),
            "optimizer": f"Adam, rate {LEARNING_RATE:g}, batch {BATCH_SIZE}, last epoch",
            "inputs": "features of I and g(I), concatenated, z-scored with training statistics",
            "targets": "parameters of g, each range scaled to [-1, 1]; flip: -1 or 1",
            "borders_px": {str(size): describe_borders(of_size) for size, of_size in self.settings.items()},
            "notices": self.notices,
        }
        return Measured(measured, protocol, results_table(chosen, summary))

    def published(self, results: dict[str, Any]) -> None:
        if self.args.card and is_main_process():
            replace_text(self.folder / PAGE_NAME, render_card(results))
            print(self.folder / PAGE_NAME)


def read_data(args: argparse.Namespace) -> tuple[list[ImageDataset], list[Tensor | None], list[str]]:
    """Opens datasets and labels for training and scoring; also returns notices.

    Labels are for the card's k-NN alone; it does without where they cannot be used, and says so.
    """
    notices = []
    if args.card:
        try:
            found = read_labelled(args.train_dataset, [args.val_dataset], "k-NN over the angle")
            return [images.dataset for images in found], [images.labels for images in found], notices
        except DataError as error:
            notices.append(f"There is no k-NN over the angle: {error}")
    # Raises where it is not the labels that are wrong.
    return [build_dataset(args.train_dataset), build_dataset(args.val_dataset)], [None, None], notices


def make_split(
    name: str,
    dataset: ImageDataset,
    labels: Tensor | None,
    max_images: int,
    draws: int,
    tasks: dict[str, Transform],
) -> Split:
    """Selects the first `max_images` of a fixed shuffle and draws transforms for each."""
    indices = fixed_subset(len(dataset), max_images)
    theta = {task: draw_theta(task, transform, len(indices), draws, name) for task, transform in tasks.items()}
    return Split(dataset, indices, None if labels is None else labels[indices], theta)


def build_tasks(args: argparse.Namespace) -> dict[str, Transform]:
    """Raises ValueError if a range is empty."""
    ranges = ranges_of(args)
    tasks = {task: build_probe_transform(task, min_crop_share=args.min_crop_share, **ranges) for task in args.tasks}
    for task, transform in tasks.items():
        if not (transform.high > transform.low).all():
            raise ValueError(
                f"Task {task} has an empty range, from {transform.low.tolist()} to {transform.high.tolist()}; see the "
                "ranges of the transforms in --help"
            )
    return tasks


def extract(
    encoders: dict[str, Encoder],
    settings: list[Setting],
    train: Split,
    val: Split,
    args: argparse.Namespace,
    device: torch.device,
) -> Extracted:
    """Computes features of encoders with the same image size; with --card also those of turned images."""
    size = next(iter(encoders.values())).image_size
    turned, disc = (turned_settings(size), [upright(size)]) if args.card else ([], [])
    shared = {
        "tokens": args.tokens,
        "device": device,
        "batch_size": args.batch_size,
        "num_workers": args.num_workers,
        "half_precision": args.precision == "bf16",
    }
    found = extract_pairs(encoders, settings, train.theta, train.dataset, train.indices, appearances=disc, **shared)
    theta = val.theta | turned_theta(len(val.indices))
    return Extracted(
        settings,
        turned,
        found,
        extract_pairs(encoders, [*settings, *turned], theta, val.dataset, val.indices, **shared),
    )


def measure_angles(
    extracted: dict[str, Extracted], train: Split, val: Split, tokens: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Computes angle curves for every encoder and choice of tokens, and the chance levels."""
    found: dict[str, Any] = {"angles_deg": list(ANGLES_DEG), "recall_at_1_by_chance": 1 / len(val.indices)}
    k, labels = min(NUM_NEIGHBOURS, len(train.indices)), None
    if train.labels is not None:
        labels = train.labels, val.labels
        found |= {"k": k, "knn_top1_by_chance": 100 / len(train.labels.unique())}
    found["curves"] = [
        angle_curve(name, measured, kind, labels, k, device) for name, measured in extracted.items() for kind in tokens
    ]
    return found


def split_rows(
    rows: Sequence[dict[str, Any]], headline: dict[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Splits rows into those with the headline's tokens and head, and the rest."""
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for row in rows:
        parts[not row.items() >= headline.items()].append(row)
    return parts


def describe_borders(settings: Sequence[Setting]) -> dict[str, dict[str, float]]:
    """Returns, by task, the side that a canvas is read with and the radius of the disc."""
    looks = {border: {} for border in ("canvas", "masked")}
    for setting in settings:
        if setting.border in looks:
            looks[setting.border][setting.task] = setting.appearance
    return {
        "canvas_side": {task: look.side for task, look in looks["canvas"].items()},
        "mask_radius": {task: look.mask_radius for task, look in looks["masked"].items()},
    }


def results_table(rows: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> str:
    """Formats one line per task and border, and per mean, with encoders side by side."""
    encoders = list(dict.fromkeys(row["encoder"] for row in rows))
    lines: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["task"], row["border"]), {})[row["encoder"]] = row
    for mean in summary:
        lines.setdefault((mean["name"], ""), {})[mean["encoder"]] = mean
    header = ["task", "border", *(f"{encoder} R2 {kind}" for encoder in encoders for kind in ("pooled", "mean"))]
    cells = [
        [*line, *(f"{by_encoder[encoder][key]:.3f}" for encoder in encoders for key in ("r2_pooled", "r2_mean"))]
        for line, by_encoder in lines.items()
    ]
    return format_table(header, cells)


if __name__ == "__main__":
    main()
