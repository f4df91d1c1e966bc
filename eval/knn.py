"""k-NN classification with the frozen class token, weighted by similarity, as DINOv2 evaluates."""

import argparse
import logging
import time
from collections.abc import Sequence
from statistics import fmean

import torch
from torch import Tensor
from tqdm import tqdm

from dinov2_eq.data.datasets import build_dataset, require_labels
from dinov2_eq.data.loaders import fixed_subset, make_eval_loader
from dinov2_eq.data.seeding import Stream, torch_generator
from dinov2_eq.distributed import pick_device
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, positive, protocol_of
from dinov2_eq.evaluation.encoder import load_encoder
from dinov2_eq.evaluation.results import results_folder, write_results
from dinov2_eq.logging import check_writable, setup_logging
from dinov2_eq.probes.features import extract_features
from dinov2_eq.probes.knn import knn_accuracy

FILE_NAME = "results_eval_knn.json"
ALL_IMAGES = -1

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
    started = time.perf_counter()
    if args.temperature <= 0:
        raise ValueError(f"--temperature must be positive, got {args.temperature}; DINOv2 uses 0.07")
    setup_logging()
    folder = results_folder(args.pretrained_weights, args.output_dir)
    datasets = {data_string: build_dataset(data_string) for data_string in (args.train_dataset, args.val_dataset)}
    for dataset in datasets.values():
        require_labels(dataset, "k-NN")
    encoder = load_encoder(args.pretrained_weights, args.config_file)
    if args.dry_run:
        logger.info("dry run: weights, data and flags can be used")
        return
    check_writable(folder)
    device = pick_device(args.device)
    encoder.backbone.to(device)

    def features_of(data_string: str) -> tuple[Tensor, Tensor]:
        dataset = datasets[data_string]
        indices = fixed_subset(len(dataset), args.max_images or len(dataset))
        loader = make_eval_loader(dataset, indices, encoder.image_size, args.batch_size, args.num_workers)
        features, labels = extract_features(
            encoder.backbone,
            tqdm(loader, unit="batch", disable=None),
            mean=encoder.mean,
            std=encoder.std,
            device=device,
            mode="cls",
            half_precision=args.precision == "bf16",
        )
        logger.info("%s: features of %d images, %.0f s", data_string, len(features), time.perf_counter() - started)
        return features, labels

    train_features, train_labels = features_of(args.train_dataset)
    val_features, val_labels = features_of(args.val_dataset)
    if not args.gather_on_cpu:
        train_features = train_features.to(device)

    results, notices = {}, []
    for n_per_class in args.n_per_class_list:
        share = "full" if n_per_class == ALL_IMAGES else f"{n_per_class} per class"
        tries = []
        for subset in draw_subsets(train_labels, n_per_class, args.n_tries):
            ks, clipped = usable_ks(args.nb_knn, len(subset), n_per_class)
            notices += [f"{share}: {notice}" for notice in clipped if f"{share}: {notice}" not in notices]
            tries.append(
                knn_accuracy(
                    train_features[subset.to(train_features.device)],
                    train_labels[subset],
                    val_features,
                    val_labels,
                    ks,
                    args.temperature,
                )
            )
        results[share] = mean_over_tries(tries)
    for notice in notices:
        logger.warning(notice)

    protocol = protocol_of(args, device, started) | {
        "num_train_images": len(train_features),
        "num_val_images": len(val_features),
        "num_classes": len(train_labels.unique()),
        "feature": "class token of the last block after the final norm, L2-normalised",
        "notices": notices,
    }
    path = write_results(folder / FILE_NAME, {"protocol": protocol, "encoder": encoder.description, "results": results})
    print(results_table(results))
    print(path)


def draw_subsets(labels: Tensor, n_per_class: int, n_tries: int) -> list[Tensor]:
    """Indices of the training images of each try: all images once, or at random `n_per_class` images of each class.

    Raises:
        ValueError: a number that is neither -1 nor positive.
    """
    if n_per_class == ALL_IMAGES:
        return [torch.arange(len(labels))]
    if n_per_class < 1:
        raise ValueError(f"--n-per-class-list {n_per_class}: give numbers of images from 1 up, or -1 for all")
    subsets = []
    for number in range(n_tries):
        order = torch.randperm(len(labels), generator=torch_generator(Stream.SUBSET, number))
        of_class = [order[labels[order] == label][:n_per_class] for label in labels.unique()]
        subsets.append(torch.cat(of_class).sort().values)
    return subsets


def usable_ks(ks: Sequence[int], num_images: int, n_per_class: int) -> tuple[list[int], list[str]]:
    """The k to report, ascending, and a notice for each that had to change.

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
