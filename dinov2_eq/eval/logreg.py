"""Logistic regression on frozen class tokens, its strength chosen on held-out images, as DINOv2 evaluates."""

import argparse
import logging
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.data.labelled import LabelledImages, draw_subset, read_labelled, split_held_out
from dinov2_eq.data.linear_loader import make_whole_image_loader
from dinov2_eq.distributed import from_main_process, gather_objects, get_rank, get_world_size, pick_device
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import accuracy_table, add_subset_flags, evaluation_parser, positive
from dinov2_eq.evaluation.features import WHOLE
from dinov2_eq.probes.accuracy import METRICS, ClassHits, count_hits
from dinov2_eq.probes.logistic import C_GRID, LogisticFit, fit_logistic

HELD_OUT_SHARE = 0.1
DTYPES = {"float64": torch.float64, "float32": torch.float32}

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval logreg", __doc__, batch_size=256)
    add_subset_flags(parser)
    add = parser.add_argument
    chooser = parser.add_mutually_exclusive_group()
    chooser.add_argument(
        "--finetune-dataset-str", metavar="DATA", help="chooses C, instead of a tenth of the training images"
    )
    chooser.add_argument(
        "--finetune-on-val", action="store_true", help="choose C by the reported images, which makes them optimistic"
    )
    add("--metric-type", choices=METRICS, default=METRICS[0], help="what is shown, and chooses C")
    add(
        "--train-features-device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where the regression is computed; auto: on --device",
    )
    add("--train-dtype", choices=DTYPES, default="float64", help="precision of the regression")
    add("--max-train-iters", type=positive, default=1000, help="of L-BFGS, for each C")
    return parser


def main(argv: list[str] | None = None) -> None:
    run(LogisticRegression, build_parser().parse_args(argv))


class LogisticRegression(Evaluation):
    file_name = "results_eval_logreg.json"
    make_loader = staticmethod(make_whole_image_loader)

    def open(self) -> None:
        args = self.args
        others = [args.val_dataset, *([args.finetune_dataset_str] if args.finetune_dataset_str else [])]
        train, self.val, *finetune = from_main_process(
            lambda: read_labelled(args.train_dataset, others, "Logistic regression", args.max_images)
        )
        self.num_classes = int(train.labels.max()) + 1
        train = draw_subset(train, args.n_per_class, args.seed)
        if args.finetune_on_val:
            self.selection = self.val
            self.chosen_by = f"by the images of {args.val_dataset} themselves: their accuracy is optimistic"
        elif finetune:
            (self.selection,) = finetune
            self.chosen_by = f"by {args.finetune_dataset_str}; the images below chose nothing"
        else:
            train, self.selection = split_held_out(train, HELD_OUT_SHARE, args.seed)
            self.chosen_by = f"by {HELD_OUT_SHARE:.0%} of the training images, held out; the images below chose nothing"
        self.train = train

    def measure(self) -> Measured:
        args, train, val, selection = self.args, self.train, self.val, self.selection
        home = self.device
        if args.train_features_device != "auto":
            home = pick_device(args.train_features_device, self.device.index or 0)
        extractor = self.extractor()

        def features_of(images: LabelledImages) -> Tensor:
            return extractor.pooled(images).to(home)

        train_features, selection_features = features_of(train), features_of(selection)
        val_features = selection_features if selection is val else features_of(val)
        own = []
        for strength in C_GRID[get_rank() :: get_world_size()]:
            found = self.fit(train_features, train.labels, strength)
            top1 = score(found, selection_features, selection).top1_percent(args.metric_type).item()
            logger.info("C = %.3g: %.2f %% of the held-out images, %d steps", strength, top1, found.num_iterations)
            own.append({"C": strength, "top1": top1, "steps": found.num_iterations, "converged": found.converged})
        grid = sorted((row for rows in gather_objects(own) for row in rows), key=lambda row: row["C"])
        best = max(grid, key=lambda row: row["top1"])["C"]  # the smallest, where several are
        if selection is not val:  # the final fit may use them too
            train_features = torch.cat([train_features, selection_features])
            train = train._replace(labels=torch.cat([train.labels, selection.labels]))
        # Once, and not in all processes at the same time.
        found = from_main_process(lambda: self.fit(train_features, train.labels, best))
        accuracies = {args.val_dataset: score(found, val_features, val).summary(0, args.metric_type)}
        protocol = {
            "num_train_images": len(train.labels),
            "num_selection_images": len(selection.labels),
            "num_images": {args.val_dataset: len(val.labels)},
            "num_classes": self.num_classes,
            "selection": self.chosen_by,
            "final_fit": "training images" if args.finetune_on_val else "training images and those that chose C",
            "feature": "class token of the last block after the final norm",
            "images": WHOLE,
            "regression": "softmax, L2 penalty |weight|^2 / (2 C) on the sum of cross-entropies, free bias, L-BFGS",
            "notices": convergence(grid, found, best) + end_of_the_grid(best),
        }
        results = {
            "encoder": self.encoder.description,
            "results": {"C": best, "accuracy": accuracies},
            "grid": grid,
        }
        table = accuracy_table(accuracies, {args.val_dataset: args.metric_type})
        return Measured(results, protocol, f"C = {best:.3g}\nchosen {self.chosen_by}\n{table}")

    def fit(self, features: Tensor, labels: Tensor, strength: float) -> LogisticFit:
        iterations, dtype = self.args.max_train_iters, DTYPES[self.args.train_dtype]
        return fit_logistic(features, labels, self.num_classes, strength, iterations, dtype)


def score(found: LogisticFit, features: Tensor, images: LabelledImages) -> ClassHits:
    return count_hits(found.weight[None], found.bias[None], found.centred(features), images.labels)


def convergence(grid: list[dict[str, Any]], final: LogisticFit, best: float) -> list[str]:
    """Returns notices about fits that did not converge."""
    notices = []
    if early := [row["C"] for row in grid if not row["converged"]]:
        notices.append(f"{len(early)} of {len(grid)} fits stopped before they converged, from C = {min(early):.3g} up")
    if not final.converged:
        notices.append(f"the final fit, C = {best:.3g}, stopped before it converged; raise --max-train-iters")
    for notice in notices:
        logger.warning(notice)
    return notices


def end_of_the_grid(best: float) -> list[str]:
    """Returns a notice if the weakest penalty was best, as happens with nearly constant features."""
    if best < max(C_GRID):
        return []
    notice = f"C = {best:.3g} is the largest that was tried; with a weaker penalty the accuracy may be higher"
    logger.warning(notice)
    return [notice]


if __name__ == "__main__":
    main()
