"""Linear classification with frozen features: DINOv2's grid of heads, trained together in one pass."""

import argparse
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.data.labelled import LabelledImages, draw_subset, read_labelled, split_held_out
from dinov2_eq.data.linear_loader import make_linear_loader
from dinov2_eq.distributed import from_main_process, get_rank, get_world_size
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import accuracy_table, add_subset_flags, evaluation_parser, positive
from dinov2_eq.evaluation.encoder import Encoder, fingerprint
from dinov2_eq.evaluation.features import CENTRE, FeatureExtractor
from dinov2_eq.evaluation.linear_training import GridCheckpoints, train_grid
from dinov2_eq.probes.accuracy import METRICS, ClassHits
from dinov2_eq.probes.features import block_features, own_share, to_unit_range
from dinov2_eq.probes.linear import LEARNING_RATES, NUM_BLOCKS, GridTraining, HeadGrid

# Heads in a checkpoint are good for the same values of these only.
FIXED_FLAGS = ("train_dataset", "max_images", "n_per_class", "select_on_val", "selection_share", "seed", "precision")
GLOBAL_BATCH = "--batch-size times processes"
SCHEDULE_FLAGS = ("epochs", "epoch_length", "eval_period_iterations", "save_checkpoint_frequency")
PATHS = ("source", "checkpoint")  # the same encoder may lie elsewhere

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval linear", __doc__, batch_size=128, num_workers=8)
    add_subset_flags(parser)
    add = parser.add_argument
    add("--test-datasets", nargs="+", default=[], metavar="DATA", help="data strings that the chosen head answers too")
    add(
        "--val-class-mapping-fpath",
        type=path_or_none,
        metavar="NPY",
        help=".npy list whose entry i is the training label of class i of --val-dataset; heads choose among these only",
    )
    add(
        "--test-class-mapping-fpaths",
        nargs="+",
        type=path_or_none,
        metavar="NPY",
        help="the same for each of the --test-datasets, or the word None where labels are those of training",
    )
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
    add(
        "--classifier-fpath",
        type=Path,
        metavar="PATH",
        help="checkpoint of an earlier evaluation: its heads are scored as they are, none is trained",
    )
    add("--val-metric-type", choices=METRICS, default=METRICS[0], help="what is shown, and chooses the head")
    add(
        "--test-metric-types",
        nargs="+",
        choices=METRICS,
        help="what is shown of each of the --test-datasets; if not given, --val-metric-type",
    )
    add("--selection-share", type=float, default=0.1, help="of the training images, held out to choose the head")
    add("--select-on-val", action="store_true", help="choose the head by the reported images, as DINOv2 does")
    return parser


def rate(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def path_or_none(text: str) -> Path | None:
    return None if text == "None" else Path(text)


class Reported(NamedTuple):
    """Images on which the chosen head is evaluated."""

    data: str
    class_mapping: Path | None
    metric: str

    @property
    def name(self) -> str:
        return self.data if self.class_mapping is None else f"{self.data}, classes of {self.class_mapping}"


def reported_sets(args: argparse.Namespace) -> dict[str, Reported]:
    """Returns the validation set and then the test sets by name; the first of a name counts.

    Raises:
        ValueError: a flag does not have one value for each test set.
    """

    def for_each_test(flag: str, values: list[Any] | None, default: Any) -> list[Any]:
        values = [default] * len(args.test_datasets) if values is None else values
        if len(values) != len(args.test_datasets):
            raise ValueError(
                f"{flag} needs a value for each of the --test-datasets: there are {len(args.test_datasets)} of them, "
                f"and {len(values)} values"
            )
        return values

    mappings = for_each_test("--test-class-mapping-fpaths", args.test_class_mapping_fpaths, None)
    metrics = for_each_test("--test-metric-types", args.test_metric_types, args.val_metric_type)
    val = Reported(args.val_dataset, args.val_class_mapping_fpath, args.val_metric_type)
    sets: dict[str, Reported] = {}
    for reported in (val, *map(Reported, args.test_datasets, mappings, metrics)):
        sets.setdefault(reported.name, reported)
    return sets


def main(argv: list[str] | None = None) -> None:
    run(Linear, build_parser().parse_args(argv))


class Linear(Evaluation):
    file_name = "results_eval_linear.json"

    def open(self) -> None:
        self.sets = reported_sets(self.args)
        self.metrics = {name: reported.metric for name, reported in self.sets.items()}
        self.train, self.selection, self.images_of = read_images(self.args, self.sets)
        self.num_classes = int(self.train.labels.max()) + 1

    def load(self) -> None:
        super().load()
        args, self.max_blocks = self.args, max(self.args.n_last_blocks)
        embed_dim = check_blocks(self.encoder, self.max_blocks)
        grid = HeadGrid(embed_dim, self.num_classes, args.learning_rates, args.n_last_blocks, args.seed)
        self.grid = grid.to(self.device)
        self.training = GridTraining(grid, args.batch_size * get_world_size(), args.epochs * args.epoch_length)
        fixed = fixed_settings(args, self.encoder, grid, self.num_classes)
        schedule = schedule_of(args, self.selection.classes)
        self.checkpoints = GridCheckpoints(self.folder, self.training, fixed, schedule)
        if args.classifier_fpath:
            self.checkpoints.load_trained(args.classifier_fpath)

    def measure(self) -> Measured:
        args, grid, selection = self.args, self.grid, self.selection
        if not (args.classifier_fpath or args.no_resume):
            self.checkpoints.resume()
        extractor = self.extractor()
        selection_features = extractor.own_blocks(selection, self.max_blocks)
        if not args.classifier_fpath:
            self.train_heads(extractor, selection_features)
        notices = [*divergence(grid), *unfinished(self.training)]
        for notice in notices:
            logger.warning(notice)
        selection_hits = hits_of_all(grid, selection, selection_features)
        best = int(selection_hits.top1_percent(args.val_metric_type).argmax())
        hits: dict[str, ClassHits] = {}
        for data in dict.fromkeys(reported.data for reported in self.sets.values()):  # read once, counted many times
            same = {name: self.images_of[name] for name, reported in self.sets.items() if reported.data == data}
            first = next(iter(same.values()))
            features = selection_features if first is selection else extractor.own_blocks(first, self.max_blocks)
            for name, images in same.items():
                hits[name] = selection_hits if images is selection else hits_of_all(grid, images, features)
        accuracies = {name: hits[name].summary(best, metric) for name, metric in self.metrics.items()}
        heads = describe_heads(
            grid, {"selection": selection_hits, **hits}, {"selection": args.val_metric_type, **self.metrics}
        )
        results = {
            "encoder": self.encoder.description,
            "results": {"head": grid.specs[best].name, "accuracy": accuracies},
            "heads": heads,
            "history": self.checkpoints.history,
        }
        heading = f"{grid.specs[best].name}\nchosen {selection_words(args)}"
        return Measured(results, self.protocol(notices), f"{heading}\n{accuracy_table(accuracies, self.metrics)}")

    def train_heads(self, extractor: FeatureExtractor, selection_features: Tensor) -> None:
        """Trains the grid, resuming from its checkpoint, and tracks the best head."""
        args, grid, training = self.args, self.grid, self.training

        def best_so_far() -> dict[str, Any]:
            top1 = hits_of_all(grid, self.selection, selection_features).top1_percent(args.val_metric_type)
            best = int(top1.argmax())  # the first, where several are
            name = grid.specs[best].name
            logger.info("step %d of %d: %.2f %% by %s", training.step, training.num_steps, top1[best], name)
            return {"head": name, "selection_top1": top1[best].item()}

        train_grid(
            feature_batches(args, extractor, self.train, self.max_blocks, training.step),
            self.checkpoints,
            best_so_far,
            score_period=args.eval_period_iterations,
            epoch_length=args.epoch_length,
            keep_every_epochs=args.save_checkpoint_frequency,
            device=self.device,
        )

    def protocol(self, notices: list[str]) -> dict[str, Any]:
        """Returns the protocol entries about heads and images."""
        args, images_of = self.args, self.images_of
        trained_before = dict.fromkeys(SCHEDULE_FLAGS) if args.classifier_fpath else {}
        return {
            **trained_before,
            "heads": f"of {args.classifier_fpath.name}, trained before" if args.classifier_fpath else "trained here",
            "global_batch_size": self.checkpoints.schedule[GLOBAL_BATCH],
            "iterations": self.training.step,
            "metrics": self.metrics,
            "num_train_images": len(self.train.indices),
            "num_selection_images": len(self.selection.indices),
            "num_images": {name: len(images.indices) for name, images in images_of.items()},
            "num_classes": self.num_classes,
            "num_choices": {
                name: self.num_classes if images.classes is None else len(images.classes)
                for name, images in images_of.items()
            },
            "selection": selection_words(args),
            "feature": "class tokens of the last blocks after the final norm, without and with the mean patch token",
            "images": f"training: random resized crop (0.08 to 1 of the area) and flip; else {CENTRE}",
            "optimizer": "SGD, momentum 0.9, no weight decay, learning rate * global batch / 256 on a cosine to 0",
            "notices": notices,
        }


def read_images(
    args: argparse.Namespace, sets: Mapping[str, Reported]
) -> tuple[LabelledImages, LabelledImages, dict[str, LabelledImages]]:
    """Opens the images for training, for choosing the head, and for reporting (by name)."""
    others, class_mappings, _ = zip(*sets.values(), strict=True)
    train, *reported = from_main_process(
        lambda: read_labelled(args.train_dataset, others, "Linear classification", args.max_images, class_mappings)
    )
    train = draw_subset(train, args.n_per_class, args.seed)
    selection = reported[0]
    if not args.select_on_val:
        train, selection = split_held_out(train, args.selection_share, args.seed)
    return train, selection, dict(zip(sets, reported, strict=True))


def hits_of_all(grid: HeadGrid, images: LabelledImages, features: Tensor) -> ClassHits:
    """Counts hits over all processes; `features` are those of this one's share of the images."""
    return grid.score(features, images.labels[own_share(len(images.labels))], images.classes).summed()


def feature_batches(
    args: argparse.Namespace, extractor: FeatureExtractor, train: LabelledImages, max_blocks: int, step: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields features of random training crops endlessly, starting after `step` steps."""
    loader = make_linear_loader(
        train.dataset,
        train.indices,
        train.labels,
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
    """Returns the token width; raises ValueError if the backbone has too few blocks."""
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size)
    try:
        features = block_features(encoder.backbone, pixels, mean=encoder.mean, std=encoder.std, num_blocks=num_blocks)
    except ValueError as error:
        raise ValueError(
            f"--n-last-blocks {num_blocks} does not fit this encoder: {error}. Give smaller numbers"
        ) from None
    return features.shape[1] // (num_blocks + 1)


def fixed_settings(args: argparse.Namespace, encoder: Encoder, grid: HeadGrid, num_classes: int) -> dict[str, Any]:
    return {
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in FIXED_FLAGS},
        "the list of heads": [spec.name for spec in grid.specs],
        "the number of classes": num_classes,
        **{f"the encoder's {name}": value for name, value in encoder.description.items() if name not in PATHS},
        "the encoder's weights": fingerprint(encoder.backbone),
    }


def schedule_of(args: argparse.Namespace, classes: Tensor | None) -> dict[str, Any]:
    """Returns the training history, including intermediate scores; `classes`: those of the selection images."""
    return {
        "--val-dataset": args.val_dataset if args.select_on_val else None,
        "what is in --val-class-mapping-fpath": None if classes is None else classes.tolist(),
        "--epochs times --epoch-length": args.epochs * args.epoch_length,
        GLOBAL_BATCH: args.batch_size * get_world_size(),
    }


def divergence(grid: HeadGrid) -> list[str]:
    """Returns a notice about diverged heads; raises ValueError if all diverged."""
    diverged = grid.diverged()
    if len(diverged) == len(grid.specs):
        raise ValueError("All heads diverged, their weights are NaN or infinite. Give smaller --learning-rates")
    return [f"diverged, and so is wrong about every image: {name}" for name in diverged]


def unfinished(training: GridTraining) -> list[str]:
    """Returns a notice if the training of the heads is not finished."""
    if training.step == training.num_steps:
        return []
    return [f"the heads are those of step {training.step} of {training.num_steps}: their training is not finished"]


def selection_words(args: argparse.Namespace) -> str:
    if args.select_on_val:
        return f"by the images of {args.val_dataset} themselves, as DINOv2 does: their accuracy is optimistic"
    return f"by {args.selection_share:.0%} of the training images, held out; the images below chose nothing"


def describe_heads(grid: HeadGrid, hits: dict[str, ClassHits], metrics: dict[str, str]) -> list[dict[str, Any]]:
    """Returns the top-1 accuracy of every head, by set of images."""
    top1 = {name: found.top1_percent(metrics[name]).tolist() for name, found in hits.items()}
    return [
        {"name": spec.name, **spec._asdict(), "top1": {name: values[number] for name, values in top1.items()}}
        for number, spec in enumerate(grid.specs)
    ]


if __name__ == "__main__":
    main()
