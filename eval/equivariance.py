"""How well frozen features tell the transform that took I to g(I): R2 of its parameters, on held-out images."""

import argparse
import logging
import time
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from dinov2_eq.data.datasets import ImageDataset, build_dataset
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.distributed import pick_device
from dinov2_eq.equivariance.transforms import TransformRanges, build_transform
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, positive, protocol_of
from dinov2_eq.evaluation.encoder import load_encoder, random_encoder
from dinov2_eq.evaluation.results import results_folder, write_results
from dinov2_eq.evaluation.transformed_pairs import PairFeatures, Setting, draw_theta, extract_pairs, settings_of
from dinov2_eq.logging import check_writable, setup_logging
from dinov2_eq.probes.features import MODES
from dinov2_eq.probes.transform_regression import (
    BATCH_SIZE,
    HEADS,
    LEARNING_RATE,
    R2Scores,
    r2_scores,
    regress_transform,
    scale_targets,
)

FILE_NAME = "results_eval_equivariance.json"
TASKS = ("rotation", "translation", "color_jitter", "blur")
# Each mean takes, of every task, the first of these borders that the task has.
MEANS = {"mean_border_free": ("canvas", "none"), "mean_zeros": ("zeros", "none"), "mean_masked": ("masked",)}
RANDOM_SEED = 0

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval equivariance", __doc__, batch_size=128)
    add = parser.add_argument
    add("--max-train-images", type=positive, default=10000, help="the first so many of a fixed shuffle train the head")
    add("--max-val-images", type=positive, default=2000, help="the first so many of a fixed shuffle are scored")
    add("--draws", type=positive, default=1, help="transforms drawn for each training image")
    add("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="names or package.module:ClassName")
    add("--tokens", choices=MODES, default="both", help="class token, mean of the patch tokens, or both")
    add("--head", choices=HEADS, default="mlp", help="what reads the features")
    add("--hidden-dim", type=positive, default=1024, help="width of the mlp")
    add("--epochs", type=positive, default=50, help="of the head")
    add("--num-seeds", type=positive, default=1, help="heads trained for each number, which is their mean")
    add("--random-init", action=argparse.BooleanOptionalAction, default=True, help="also score the untrained encoder")
    ranges = parser.add_argument_group("ranges of the transforms")
    ranges.add_argument("--max-angle-deg", type=float, default=TransformRanges.max_angle_deg, help="rotation")
    ranges.add_argument("--max-shift", type=float, default=TransformRanges.max_shift, help="share of the side")
    ranges.add_argument(
        "--max-color", type=float, default=TransformRanges.max_color, help="brightness, contrast, saturation"
    )
    ranges.add_argument("--max-hue", type=float, default=TransformRanges.max_hue, help="turns")
    ranges.add_argument(
        "--blur-sigma",
        nargs=2,
        type=float,
        default=TransformRanges.blur_sigma_min_max,
        metavar=("LOW", "HIGH"),
        help="pixels",
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    started = time.perf_counter()
    setup_logging()
    folder = results_folder(args.pretrained_weights, args.output_dir)
    train_dataset, val_dataset = build_dataset(args.train_dataset), build_dataset(args.val_dataset)
    encoders = {"trained": load_encoder(args.pretrained_weights, args.config_file)}
    size = encoders["trained"].image_size
    ranges = {
        "max_angle_deg": args.max_angle_deg,
        "max_shift": args.max_shift,
        "max_color": args.max_color,
        "max_hue": args.max_hue,
        "blur_sigma_min_max": list(args.blur_sigma),
    }
    tasks = {task: build_transform(task, **ranges) for task in dict.fromkeys(args.tasks)}
    for task, transform in tasks.items():
        if not (transform.high > transform.low).all():
            raise ValueError(
                f"Task {task} has an empty range, from {transform.low.tolist()} to {transform.high.tolist()}"
            )
    settings = [setting for task, transform in tasks.items() for setting in settings_of(task, transform, size)]
    if args.dry_run:
        logger.info("dry run: weights, data and flags can be used")
        return
    check_writable(folder)
    device = pick_device(args.device)
    if args.random_init:
        encoders["random-init"] = random_encoder(encoders["trained"], RANDOM_SEED)
    for encoder in encoders.values():
        encoder.backbone.to(device)

    def pairs_of(
        split: str, dataset: ImageDataset, max_images: int, draws: int
    ) -> tuple[PairFeatures, dict[str, Tensor], int]:
        indices = fixed_subset(len(dataset), max_images)
        theta = {task: draw_theta(task, transform, len(indices), draws, split) for task, transform in tasks.items()}
        pairs = extract_pairs(
            encoders,
            settings,
            theta,
            dataset,
            indices,
            mode=args.tokens,
            device=device,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            half_precision=args.precision == "bf16",
        )
        logger.info("%s: %d images, features done, %.0f s", split, len(indices), time.perf_counter() - started)
        targets = {
            task: scale_targets(theta[task].flatten(0, 1), transform.low, transform.high)
            for task, transform in tasks.items()
        }
        return pairs, targets, len(indices)

    train_pairs, train_targets, num_train = pairs_of("train", train_dataset, args.max_train_images, args.draws)
    val_pairs, val_targets, num_val = pairs_of("val", val_dataset, args.max_val_images, 1)

    rows = []
    for name in encoders:
        for setting in settings:
            inputs = [pairs.pairs(name, setting).to(device) for pairs in (train_pairs, val_pairs)]
            scores = []
            for seed in range(args.num_seeds):
                head = {"seed": seed, "head": args.head, "hidden_dim": args.hidden_dim, "epochs": args.epochs}
                predicted = regress_transform(inputs[0], train_targets[setting.task], inputs[1], **head)
                scores.append(r2_scores(predicted.cpu(), val_targets[setting.task]))
            row = make_row(name, setting, scores)
            rows.append(row)
            elapsed = time.perf_counter() - started
            logger.info("%s, %s, %s: R2 %.3f, %.0f s", name, setting.task, setting.border, row["r2_pooled"], elapsed)
    summary = summarise(rows)

    masked = [setting for setting in settings if setting.border == "masked"]
    protocol = protocol_of(args, device, started) | {
        "num_train_images": num_train,
        "num_val_images": num_val,
        "optimizer": f"Adam, rate {LEARNING_RATE:g}, batch {BATCH_SIZE}, last epoch",
        "inputs": "features of I and g(I), concatenated, z-scored with training statistics",
        "targets": "parameters of g, each range scaled to [-1, 1]",
        "canvas_px": {setting.task: setting.appearance.side for setting in settings if setting.border == "canvas"},
        "mask_radius_px": {setting.task: setting.appearance.mask_radius for setting in masked},
    }
    results = {"protocol": protocol, "encoder": encoders["trained"].description, "rows": rows, "summary": summary}
    path = write_results(folder / FILE_NAME, results)
    print(results_table(rows, summary))
    print(path)


def make_row(encoder: str, setting: Setting, scores: Sequence[R2Scores]) -> dict[str, Any]:
    """Means over the seeds of the head, and the spread of the headline number where there are several."""
    pooled = [score.pooled for score in scores]
    components = [fmean(values) for values in zip(*(score.components for score in scores), strict=True)]
    row = {
        "encoder": encoder,
        "task": setting.task,
        "border": setting.border,
        "r2_pooled": fmean(pooled),
        "r2_mean": fmean(score.mean for score in scores),
        "r2_components": dict(zip(setting.transform.components, components, strict=True)),
    }
    return row | ({"r2_pooled_std": stdev(pooled)} if len(pooled) > 1 else {})


def summarise(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the four standard tasks of each encoder; none where a task was left out."""
    summary = []
    for encoder in dict.fromkeys(row["encoder"] for row in rows):
        found = {(row["task"], row["border"]): row for row in rows if row["encoder"] == encoder}
        if not set(TASKS) <= {task for task, _ in found}:
            continue
        for name, borders in MEANS.items():
            chosen = [next(found[task, border] for border in borders if (task, border) in found) for task in TASKS]
            means = {key: fmean(row[key] for row in chosen) for key in ("r2_pooled", "r2_mean")}
            summary.append({"encoder": encoder, "name": name, **means})
    return summary


def results_table(rows: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> str:
    """One line for each task and border and for each mean, encoders side by side."""
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
