"""Linear classification with frozen features: DINOv2's grid of heads, trained together in one pass."""

import argparse
import logging
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.data.linear_loader import make_linear_loader
from dinov2_eq.distributed import from_main_process, get_rank, get_world_size
from dinov2_eq.evaluation.command_line import (
    accuracy_table,
    add_subset_flags,
    encoder_of,
    evaluation_parser,
    evaluation_processes,
    extraction_settings,
    goes_on,
    positive,
    protocol_of,
)
from dinov2_eq.evaluation.encoder import Encoder, fingerprint, load_encoder
from dinov2_eq.evaluation.features import CENTRE, FeatureExtractor
from dinov2_eq.evaluation.labelled import LabelledImages, draw_subset, read_labelled, split_held_out
from dinov2_eq.evaluation.linear_training import GridCheckpoints, train_grid
from dinov2_eq.evaluation.results import publish, results_folder
from dinov2_eq.probes.accuracy import METRICS, ClassHits
from dinov2_eq.probes.features import block_features, own_share, to_unit_range
from dinov2_eq.probes.linear import LEARNING_RATES, NUM_BLOCKS, GridTraining, HeadGrid

FILE_NAME = "results_eval_linear.json"
# A running checkpoint is good for the same values of these only.
FIXED_FLAGS = ("train_dataset", "max_images", "n_per_class", "select_on_val", "selection_share", "seed", "precision")

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval linear", __doc__, batch_size=128, num_workers=8)
    add_subset_flags(parser)
    add = parser.add_argument
    add("--test-datasets", nargs="+", default=[], metavar="DATA", help="data strings that the chosen head answers too")
    add("--epochs", type=positive, default=10, help="the learning rates fall to 0 along a cosine until their end")
    add("--epoch-length", type=positive, default=1250, help="steps, each of --batch-size images of every process")
    add("--learning-rates", nargs="+", type=rate, default=LEARNING_RATES, metavar="LR", help="for 256 images a step")
    add(
        "--n-last-blocks", nargs="+", type=positive, default=NUM_BLOCKS, metavar="N", help="whose class tokens are read"
    )
    add("--eval-period-iterations", type=positive, default=1250, help="steps from score to score while training")
    add(
        "--save-checkpoint-frequency",
        type=positive,
        default=20,
        help="epochs between copies for keeps; the running checkpoint is written after each epoch",
    )
    add("--no-resume", action="store_true", help="start again; the running checkpoint is replaced")
    add("--val-metric-type", choices=METRICS, default=METRICS[0], help="what is shown, and chooses the head")
    add("--selection-share", type=float, default=0.1, help="of the training images, held out to choose the head")
    add("--select-on-val", action="store_true", help="choose the head by the reported images, as DINOv2 does")
    return parser


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with evaluation_processes(args) as device:
        evaluate(args, device)


def evaluate(args: argparse.Namespace, device: torch.device) -> None:
    started = time.perf_counter()
    folder = results_folder(encoder_of(args), args.output_dir)
    names = list(dict.fromkeys([args.val_dataset, *args.test_datasets]))
    train, *reported = from_main_process(
        lambda: read_labelled(args.train_dataset, names, "Linear classification", args.max_images)
    )
    num_classes = int(train.labels.max()) + 1
    train = draw_subset(train, args.n_per_class, args.seed)
    selection = reported[0]
    if not args.select_on_val:
        train, selection = split_held_out(train, args.selection_share, args.seed)
    encoder = load_encoder(encoder_of(args), args.config_file)
    max_blocks = max(args.n_last_blocks)
    embed_dim = check_blocks(encoder, max_blocks)
    if not goes_on(args, folder):
        return

    extractor = FeatureExtractor(encoder, device, **extraction_settings(args))
    grid = HeadGrid(embed_dim, num_classes, args.learning_rates, args.n_last_blocks, args.seed).to(device)
    training = GridTraining(grid, args.batch_size * get_world_size(), args.epochs * args.epoch_length)
    checkpoints = GridCheckpoints(folder, training, fixed_settings(args, encoder, grid))
    if not args.no_resume:
        checkpoints.resume()

    def hits_of(images: LabelledImages, features: Tensor) -> ClassHits:
        return grid.count_hits(features, images.labels[own_share(len(images.labels))]).summed()

    def best_so_far() -> dict[str, Any]:
        top1 = hits_of(selection, selection_features).top1_percent(args.val_metric_type)
        best = int(top1.argmax())  # the first, where several are
        logger.info(
            "step %d of %d: %.2f %% by %s", training.step, training.num_steps, top1[best], grid.specs[best].name
        )
        return {"head": grid.specs[best].name, "selection_top1": top1[best].item()}

    selection_features = extractor.own_blocks(selection, max_blocks)
    train_grid(
        feature_batches(args, extractor, train, max_blocks, training.step),
        checkpoints,
        best_so_far,
        score_period=args.eval_period_iterations,
        epoch_length=args.epoch_length,
        keep_every_epochs=args.save_checkpoint_frequency,
        device=device,
    )
    notices = divergence(grid)
    selection_hits = hits_of(selection, selection_features)
    best = int(selection_hits.top1_percent(args.val_metric_type).argmax())
    hits = {
        name: selection_hits if images is selection else hits_of(images, extractor.own_blocks(images, max_blocks))
        for name, images in zip(names, reported, strict=True)
    }
    accuracies = {name: found.summary(best, args.val_metric_type) for name, found in hits.items()}
    protocol = protocol_of(args, device, started) | {
        "global_batch_size": args.batch_size * get_world_size(),
        "iterations": training.num_steps,
        "num_train_images": len(train.indices),
        "num_selection_images": len(selection.indices),
        "num_images": {name: len(images.indices) for name, images in zip(names, reported, strict=True)},
        "num_classes": num_classes,
        "selection": selection_words(args),
        "feature": "class tokens of the last blocks after the final norm, without and with the mean patch token",
        "images": f"training: random resized crop (0.08 to 1 of the area) and flip; else {CENTRE}",
        "optimizer": "SGD, momentum 0.9, no weight decay, learning rate * global batch / 256 on a cosine to 0",
        "notices": notices,
    }
    results = {
        "protocol": protocol,
        "encoder": encoder.description,
        "results": {"head": grid.specs[best].name, "accuracy": accuracies},
        "heads": describe_heads(grid, {"selection": selection_hits, **hits}, args.val_metric_type),
        "history": checkpoints.history,
    }
    heading = f"{grid.specs[best].name}\nchosen {selection_words(args)}"
    publish(folder / FILE_NAME, results, f"{heading}\n{accuracy_table(accuracies, args.val_metric_type)}")


def feature_batches(
    args: argparse.Namespace, extractor: FeatureExtractor, train: LabelledImages, max_blocks: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features of random crops of the training images, without end, as they follow after `step` steps."""
    loader = make_linear_loader(
        *train,
        extractor.encoder.image_size,
        seed=args.seed,
        batch_size=args.batch_size,
        rank=get_rank(),
        world_size=get_world_size(),
        start_position=step * args.batch_size * get_world_size(),
        num_workers=args.num_workers,
    )
    for images, labels in loader:
        pixels = to_unit_range(images, extractor.device)
        yield extractor.encode_blocks(pixels, max_blocks), labels.to(extractor.device)


def check_blocks(encoder: Encoder, num_blocks: int) -> int:
    """The width of a token; raises ValueError where the backbone has fewer blocks."""
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    try:
        features = block_features(encoder.backbone, pixels, mean=encoder.mean, std=encoder.std, num_blocks=num_blocks)
    except ValueError as error:
        raise ValueError(f"--n-last-blocks {num_blocks} does not fit this encoder: {error}") from None
    return features.shape[1] // (num_blocks + 1)


def fixed_settings(args: argparse.Namespace, encoder: Encoder, grid: HeadGrid) -> dict[str, Any]:
    return {
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in FIXED_FLAGS},
        "--val-dataset": args.val_dataset if args.select_on_val else None,
        "the list of heads": [spec.name for spec in grid.specs],
        "--epochs times --epoch-length": args.epochs * args.epoch_length,
        "--batch-size times processes": args.batch_size * get_world_size(),
        "the encoder": encoder.description,
        "the encoder's weights": fingerprint(encoder.backbone),
    }


def divergence(grid: HeadGrid) -> list[str]:
    """A notice about heads that diverged; raises ValueError where all did."""
    diverged = grid.diverged()
    if len(diverged) == len(grid.specs):
        raise ValueError("All heads diverged, their weights are NaN or infinite. Give smaller --learning-rates")
    notices = [f"diverged, and so is wrong about every image: {name}" for name in diverged]
    for notice in notices:
        logger.warning(notice)
    return notices


def selection_words(args: argparse.Namespace) -> str:
    if args.select_on_val:
        return f"by the images of {args.val_dataset} themselves, as DINOv2 does: their accuracy is optimistic"
    return f"by {args.selection_share:.0%} of the training images, held out; the images below chose nothing"


def describe_heads(grid: HeadGrid, hits: dict[str, ClassHits], metric: str) -> list[dict[str, Any]]:
    """Every head with its top-1, by the name of the images."""
    top1 = {name: found.top1_percent(metric).tolist() for name, found in hits.items()}
    return [
        {"name": spec.name, **spec._asdict(), "top1": {name: values[number] for name, values in top1.items()}}
        for number, spec in enumerate(grid.specs)
    ]


if __name__ == "__main__":
    main()
