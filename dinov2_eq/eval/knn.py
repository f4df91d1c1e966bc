"""k-NN classification with the frozen class token, weighted by similarity, as DINOv2 evaluates."""

import argparse
import logging
import math
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor

from dinov2_eq.data.labelled import ALL_IMAGES, draw_per_class, read_labelled
from dinov2_eq.distributed import from_main_process
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, positive
from dinov2_eq.evaluation.features import CENTRE
from dinov2_eq.probes.knn import knn_accuracy

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval knn", __doc__, batch_size=256)
    parser.add_argument(
        "--nb_knn", nargs="+", type=positive, default=[10, 20, 100, 200], metavar="K", help="neighbours"
    )
    parser.add_argument("--temperature", type=float, default=0.07, help="of the weights exp(similarity / temperature)")
    parser.add_argument(
        "--gather-on-cpu", action="store_true", help="keep training features in main memory, not on the GPU"
    )
    parser.add_argument(
        "--n-per-class-list",
        nargs="+",
        type=int,
        default=[ALL_IMAGES],
        metavar="N",
        help="training images of each class; -1: all",
    )
    parser.add_argument("--n-tries", type=positive, default=1, help="draws of the images of each class, averaged")
    parser.add_argument(
        "--max-images", type=positive, help="of each dataset, the first so many of a fixed shuffle; None: all"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    if not 0 < args.temperature < math.inf:
        raise ValueError(f"--temperature must be positive, got {args.temperature}; DINOv2 uses 0.07")
    run(Knn, args)


class Knn(Evaluation):
    file_name = "results_eval_knn.json"

    def open(self) -> None:
        args = self.args
        self.train, self.val = from_main_process(
            lambda: read_labelled(args.train_dataset, [args.val_dataset], "k-NN", args.max_images)
        )
        self.subsets = {n: draw_subsets(self.train.labels, n, args.n_tries) for n in args.n_per_class_list}

    def measure(self) -> Measured:
        args, train, val, extractor = self.args, self.train, self.val, self.extractor()
        train_features, val_features = extractor.pooled(train), extractor.pooled(val)
        if not args.gather_on_cpu:
            train_features = train_features.to(self.device)

        results, notices = {}, []
        for n_per_class, draws in self.subsets.items():
            share = "full" if n_per_class == ALL_IMAGES else f"{n_per_class} per class"
            tries = []
            for subset in draws:
                ks, clipped = usable_ks(args.nb_knn, len(subset), n_per_class)
                notices += [f"{share}: {notice}" for notice in clipped if f"{share}: {notice}" not in notices]
                chosen = train_features[subset.to(train_features.device)], train.labels[subset]
                tries.append(knn_accuracy(*chosen, val_features, val.labels, ks, args.temperature))
            results[share] = mean_over_tries(tries)
        for notice in notices:
            logger.warning(notice)
        protocol = {
            "num_train_images": len(train.indices),
            "num_val_images": len(val.indices),
            "num_classes": len(train.labels.unique()),
            "feature": "class token of the last block after the final norm, L2-normalised",
            "images": CENTRE,
            "notices": notices,
        }
        table = "\n".join([results_table(results), *notices])
        return Measured({"encoder": self.encoder.description, "results": results}, protocol, table)


def draw_subsets(labels: Tensor, n_per_class: int, n_tries: int) -> list[Tensor]:
    """Returns the training images of each try: all of them, or `n_per_class` random images per class.

    Raises:
        ValueError: a number that is neither -1 nor positive, or a class with fewer images.
    """
    if n_per_class == ALL_IMAGES:
        return [torch.arange(len(labels))]
    return [draw_per_class(labels, n_per_class, number, "--n-per-class-list") for number in range(n_tries)]


def usable_ks(ks: Sequence[int], num_images: int, n_per_class: int) -> tuple[list[int], list[str]]:
    """Returns the values of k in ascending order, and a notice for each that was changed.

    A k larger than the number of images becomes that number. With n images of each class, k above n is left out and
    n itself added, as in DINOv2: further neighbours are certain to be of other classes.
    """
    if n_per_class != ALL_IMAGES:
        kept = {k for k in ks if k <= n_per_class} | {min(n_per_class, num_images)}
        dropped = sorted(set(ks) - kept)
        return sorted(kept), [f"k = {k} is left out, it is more than the images of a class" for k in dropped]
    notices = [f"k = {k} became {num_images}, the number of training images" for k in ks if k > num_images]
    return sorted({min(k, num_images) for k in ks}), notices


def mean_over_tries(tries: list[dict[int, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        str(k): {metric: fmean(accuracies[k][metric] for accuracies in tries) for metric in tries[0][k]}
        for k in tries[0]
    }


def results_table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    rows = [
        [share, k, *(f"{accuracies[metric]:.2f}" if metric in accuracies else "" for metric in ("top1", "top5"))]
        for share, by_k in results.items()
        for k, accuracies in by_k.items()
    ]
    return format_table(["training images", "k", "top-1 %", "top-5 %"], rows)


if __name__ == "__main__":
    main()
