"""Whether stronger changes of an image move its frozen features farther (our reading of Xie et al. 2022).

Each image is changed at ten strengths, from a tenth of the range of the transform to all of it, in one direction drawn
for it, such as clockwise. The distance is 1 - cosine between the features of the image and of the changed image.

Order accuracy is the share of triplets (image, weaker, stronger change) whose distances are in this order; equal
distances count one half, so that chance is 0.5. Spearman is the rank correlation between strength and distance, for
each image and then averaged, or across: of all images together. An untrained network is smooth and scores nearly 1 for
each image, so that alone says little. The relative distance is that of the strongest change, divided by the mean
distance between different images: 0 is invariance. --val-dataset is read, --train-dataset is not.
"""

import argparse
import logging
import time
from collections.abc import Mapping
from typing import Any

import torch

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.distributed import from_main_process
from dinov2_eq.equivariance.transforms import Transform
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import evaluation_parser, extraction_settings, format_table, positive
from dinov2_eq.evaluation.probe_transforms import add_range_flags, ordered_transform, ranges_of
from dinov2_eq.evaluation.side_by_side import name_encoders, with_untrained
from dinov2_eq.evaluation.transformed_pairs import Setting, draw_theta, extract_pairs, settings_of
from dinov2_eq.probes.features import MODES
from dinov2_eq.probes.invariance import mean_cosine_of_others
from dinov2_eq.probes.order import feature_distances, order_accuracy, spearman, spearman_across

STRENGTHS = tuple(step / 10 for step in range(1, 11))
TITLES = {
    "order_accuracy": "order",
    "spearman": "Spearman",
    "spearman_across": "across",
    "relative_distance": "distance",
}

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval order", __doc__, batch_size=128)
    add = parser.add_argument
    add("--max-val-images", type=positive, default=1000, help="the first so many of a fixed shuffle")
    add(
        "--tasks",
        nargs="+",
        default=["rotation", "color_jitter", "blur"],
        metavar="TASK",
        help="transforms: rotation, translation, se2, color_jitter, blur, all, one_of_all, or package.module:ClassName",
    )
    add(
        "--tokens",
        choices=MODES,
        default="cls",
        help="cls: class token; mean: of the patch tokens; both; grid2: mean patch tokens of the four quarters",
    )
    add("--random-init", action=argparse.BooleanOptionalAction, default=True, help="also score the untrained encoder")
    add_range_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    run(Order, build_parser().parse_args(argv))


class Order(Evaluation):
    file_name = "results_eval_order.json"

    def open(self) -> None:
        self.tasks = {task: ordered_transform("--tasks", task, ranges_of(self.args)) for task in self.args.tasks}
        self.dataset = from_main_process(lambda: build_dataset(self.args.val_dataset))

    def load(self) -> None:
        super().load()
        size = self.encoder.image_size
        self.settings = [each for task, transform in self.tasks.items() for each in settings_of(task, transform, size)]

    def measure(self) -> Measured:
        args, started = self.args, time.perf_counter()
        encoders = name_encoders(self.sources, [self.encoder])
        encoders = with_untrained(encoders) if args.random_init else encoders
        for encoder in encoders.values():
            encoder.backbone.to(self.device)
        indices = fixed_subset(len(self.dataset), args.max_val_images)
        theta = {task: strengths_of(task, transform, len(indices)) for task, transform in self.tasks.items()}
        extraction = {"device": self.device, "tokens": [args.tokens], **extraction_settings(args)}
        features = extract_pairs(encoders, self.settings, theta, self.dataset, indices, **extraction)
        logger.info("features of %s done, %.0f s", ", ".join(encoders), time.perf_counter() - started)

        by_name: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in encoders}
        for name, by_task in by_name.items():
            for setting in self.settings:
                base = features.of_images(name, setting.appearance, args.tokens).double()
                changed = features.of_transformed(name, setting, args.tokens).double()
                distances = feature_distances(base, changed.unflatten(0, (len(STRENGTHS), -1)))
                others = 1 - mean_cosine_of_others(base)
                by_task.setdefault(setting.task, {})[setting.border] = scores_of(distances, others)
        table = results_table(by_name, self.settings)
        results = {
            "encoder": self.encoder.description,
            "results": by_name.pop(next(iter(encoders))),
            "comparisons": by_name,
        }
        protocol = {
            "num_val_images": len(indices),
            "strengths": STRENGTHS,
            "distance": "1 - cosine",
            "source": "our reading of Xie et al. 2022",
        }
        return Measured(results, protocol, table)


def strengths_of(task: str, transform: Transform, num_images: int) -> torch.Tensor:
    """Returns theta of each strength, [S, N, P]: a direction is drawn for each image and followed to its end."""
    theta = draw_theta(task, transform, num_images, 1, "order")[0]
    farthest = theta / transform.strength(theta).clamp(min=1e-6)[:, None]
    return torch.stack([transform.scaled(farthest, strength) for strength in STRENGTHS])


def scores_of(distances: torch.Tensor, others: float) -> dict[str, Any]:
    """Returns what distances [S, N] tell; `others` is the mean distance between different images."""
    return {
        "order_accuracy": order_accuracy(distances).mean().item(),
        "spearman": spearman(distances).mean().item(),
        "spearman_across": spearman_across(distances),
        "relative_distance": (distances[-1].mean() / others).item() if others else 0.0,
        "distances": distances.mean(dim=1).tolist(),
    }


def results_table(by_name: Mapping[str, Mapping[str, Mapping[str, Any]]], settings: list[Setting]) -> str:
    """Formats one line for each task and border, with encoders side by side."""
    header = ["task", "border", *(f"{name} {title}" for name in by_name for title in TITLES.values())]
    rows = [
        [task, border, *(f"{by_name[name][task][border][key]:.3f}" for name in by_name for key in TITLES)]
        for task, border in ((setting.task, setting.border) for setting in settings)
    ]
    return format_table(header, rows)


if __name__ == "__main__":
    main()
