"""Class, rotation and colours of rendered objects from frozen features: the protocols of 3DIEBench (SIE, 2302.10283).

A linear layer tells the class of an image. An MLP reads the features of two images of an object and regresses the
rotation between them, as a unit quaternion, or the two differences of hue. What is scored are objects that no head has
seen. If the tokens are split, by projections or by their channels, each part is read by itself as well.

"R2 pooled" is SIE's: all components around one common mean. The components of the quaternion have different means
(0, 0, 0 and 0.53), so a constant prediction already scores 0.229 on 3DIEBench's rotations, and a lower value says
nothing about rotation. "R2 mean" is the mean over components, each around its own mean; a constant scores 0. The row
"constant" is a predictor that always gives the mean, or the most frequent class. In the row "latents" the same heads
read what the images were rendered from, which shows how far heads and data can get.

Ranks of predicted views (MRR, H@k, PRE) need SIE's predictor, which is no part of an encoder, and are not measured.
"""

import argparse
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dinov2_eq.data.datasets import DataError, UnreadableImage
from dinov2_eq.data.datasets.threediebench import (
    ANGLES,
    COLOUR,
    HUES,
    ROTATION,
    ThreeDIEBench,
    quaternion,
    relative_theta,
)
from dinov2_eq.data.labelled import LabelledImages, read_labelled
from dinov2_eq.data.linear_loader import make_whole_image_loader
from dinov2_eq.data.loaders import fixed_subset
from dinov2_eq.distributed import from_main_process, gather_objects, get_rank, get_world_size
from dinov2_eq.evaluation.base import Evaluation, Measured, run
from dinov2_eq.evaluation.command_line import evaluation_parser, format_table, positive
from dinov2_eq.evaluation.encoder import Encoder
from dinov2_eq.evaluation.features import WHOLE
from dinov2_eq.evaluation.side_by_side import name_encoders, with_untrained
from dinov2_eq.probes.features import MODES
from dinov2_eq.probes.transform_regression import (
    BATCH_SIZE,
    LEARNING_RATE,
    build_head,
    fit_head,
    r2_scores,
    z_scored,
)

CLASSIFICATION = "classification"
REGRESSIONS = {"rotation": ROTATION, "colour": COLOUR}  # with the components of theta, in its order
LATENTS, CONSTANT = "latents", "constant"
HIDDEN_DIM = 1024  # of the MLP
SEED = 0
TABLE = (
    (CLASSIFICATION, "top1", "top-1 %"),
    *(
        (task, key, f"{task} {name}")
        for task in REGRESSIONS
        for key, name in (("r2_pooled", "R2"), ("r2_mean", "mean"))
    ),
)

logger = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    parser = evaluation_parser("dinov2-eq eval 3diebench", __doc__, batch_size=256)
    parser.set_defaults(train_dataset="3DIEBench:split=TRAIN:root=3DIEBench")
    parser.set_defaults(val_dataset="3DIEBench:split=VAL:root=3DIEBench")
    add = parser.add_argument
    add(
        "--tokens",
        choices=MODES,
        default="both",
        help="cls: class token; mean: of the patch tokens; both; grid2: mean patch tokens of the four quarters",
    )
    add(
        "--equivariant-share",
        type=share,
        metavar="SHARE",
        help="the last channels of a token are its equivariant part, as in SIE (0.5); None: the projections that a run "
        "was trained with, if any",
    )
    add("--views", type=positive, default=8, help="images of each object, the first ones; all where there are fewer")
    add("--max-objects", type=positive, help="objects of each split, the first ones of a fixed shuffle; None: all")
    add("--epochs", type=positive, default=50, help="of the heads; in each, an image is paired with another view anew")
    add("--random-init", action=argparse.BooleanOptionalAction, default=True, help="also score the untrained encoder")
    return parser


def share(text: str) -> float:
    """Parses a share of the channels."""
    if not 0 < (value := float(text)) < 1:
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {value:g}")
    return value


def main(argv: list[str] | None = None) -> None:
    run(RenderedObjects, build_parser().parse_args(argv))


class Views(NamedTuple):
    """Images of objects, the same number of each, object by object."""

    images: LabelledImages
    latents: np.ndarray  # [N, 7], of each image
    per_object: int

    def partners(self, generator: torch.Generator) -> Tensor:
        """Draws another view of the object for each image: [N] int64, places among the N images."""
        places = torch.arange(len(self.latents))
        steps = torch.randint(1, self.per_object, (len(places),), generator=generator)
        return places - places % self.per_object + (places + steps) % self.per_object

    def theta(self, partners: Tensor, task: str) -> Tensor:
        """Returns what leads from each image to its partner: [N, 4] of rotation or [N, 2] of colour, float32."""
        theta = torch.from_numpy(relative_theta(self.latents, self.latents[partners.numpy()])).float()
        return theta[:, [ThreeDIEBench.components.index(name) for name in REGRESSIONS[task]]]

    def known(self) -> Tensor:
        """Returns what the images were rendered from, [N, 6]: orientation as a quaternion, and both hues."""
        known = [quaternion(self.latents[:, ANGLES]), self.latents[:, HUES]]
        return torch.from_numpy(np.concatenate(known, axis=1)).float()


class RenderedObjects(Evaluation):
    file_name = "results_eval_3diebench.json"
    make_loader = staticmethod(make_whole_image_loader)

    def open(self) -> None:
        args = self.args

        def read() -> list[Views]:
            both = read_labelled(args.train_dataset, [args.val_dataset], "eval 3diebench")
            return [read_views(images, args.views, args.max_objects) for images in both]

        self.train, self.val = from_main_process(read)

    def measure(self) -> Measured:
        started = time.perf_counter()
        encoders = name_encoders(self.sources, [self.encoder])
        encoders = with_untrained(encoders) if self.args.random_init else encoders
        features = {(name, part): rows for name, encoder in encoders.items() for part, rows in self.parts(encoder)}
        jobs = [(*key, task) for key in features for task in (CLASSIFICATION, *REGRESSIONS)]
        features[LATENTS, "full"] = [self.train.known(), self.val.known()]
        jobs += [(LATENTS, "full", task) for task in REGRESSIONS]  # they know nothing of classes
        own = {}
        for name, part, task in jobs[get_rank() :: get_world_size()]:
            train, val = (rows.float().to(self.device) for rows in z_scored(*features[name, part]))
            own[name, part, task] = (
                self.classify(train, val) if task == CLASSIFICATION else self.regress(task, train, val)
            )
            logger.info("%s, %s, %s done, %.0f s", name, part, task, time.perf_counter() - started)
        scores = {job: found for of_process in gather_objects(own) for job, found in of_process.items()}

        by_name: dict[str, dict[str, dict[str, Any]]] = {}
        for name, part, task in jobs:
            by_name.setdefault(name, {}).setdefault(part, {})[task] = scores[name, part, task]
        by_name[CONSTANT] = {"full": self.constant()}
        table = results_table(by_name)
        results = {
            "encoder": self.encoder.description,
            "results": by_name.pop(next(iter(encoders))),
            "comparisons": by_name,
        }
        protocol = {
            "num_train_objects": len(self.train.latents) // self.train.per_object,
            "num_val_objects": len(self.val.latents) // self.val.per_object,
            "num_views": {"train": self.train.per_object, "val": self.val.per_object},
            "images": WHOLE,
            "heads": f"z-scored inputs; linear for classes, MLP of width {HIDDEN_DIM} for the rest",
            "optimizer": f"Adam, rate {LEARNING_RATE:g}, batch {BATCH_SIZE}, last epoch",
        }
        return Measured(results, protocol, table)

    def parts(self, encoder: Encoder) -> Iterator[tuple[str, list[Tensor]]]:
        """Yields features [N, F] of training and held-out images by name of what they are: all, or a part of it."""
        extractor, dim = self.extractor(encoder), encoder.backbone.embed_dim
        pooled = [extractor.pooled(views.images, self.args.tokens) for views in (self.train, self.val)]
        yield "full", pooled
        readers = {"invariant": encoder.invariant, "equivariant": encoder.equivariant}
        if share := self.args.equivariant_share:
            first = dim - max(round(share * dim), 1)
            readers = {
                "invariant": lambda tokens: tokens[..., :first],
                "equivariant": lambda tokens: tokens[..., first:],
            }
        for part, read in readers.items():
            if read is not None:
                yield part, [read(rows.unflatten(1, (-1, dim))).flatten(1) for rows in pooled]

    def classify(self, train: Tensor, val: Tensor) -> dict[str, float]:
        """Returns the accuracy of a linear layer on features [N, F] and [M, F]."""
        labels, num_classes = self.train.images.labels.to(self.device), int(self.train.images.labels.max()) + 1
        generator = torch.Generator().manual_seed(SEED)
        network = build_head("linear", train.shape[1], HIDDEN_DIM, num_classes, generator).to(self.device)
        fit_head(network, lambda: (train, labels), F.cross_entropy, self.args.epochs, generator)
        with torch.no_grad():
            return self.accuracy(network(val).argmax(dim=1).cpu())

    def regress(self, task: str, train: Tensor, val: Tensor) -> dict[str, Any]:
        """Returns R2 of an MLP on pairs of features [N, F] and [M, F]."""
        generator = torch.Generator().manual_seed(SEED)

        def draw() -> tuple[Tensor, Tensor]:
            partners = self.train.partners(generator)
            return pairs_of(train, partners), self.train.theta(partners, task).to(self.device)

        network = build_head("mlp", 2 * train.shape[1], HIDDEN_DIM, len(REGRESSIONS[task]), generator).to(self.device)
        fit_head(network, draw, F.mse_loss, self.args.epochs, generator)
        with torch.no_grad():
            return self.r2(task, network(pairs_of(val, self.val_partners())).cpu())

    def constant(self) -> dict[str, dict[str, Any]]:
        """Returns the scores of always giving the most frequent class, or the mean of theta, of the training data."""
        generator, num_images = torch.Generator().manual_seed(SEED), len(self.val.latents)
        common = self.train.images.labels.bincount().argmax()
        found = {CLASSIFICATION: self.accuracy(common.expand(num_images))}
        partners = self.train.partners(generator)
        for task in REGRESSIONS:
            found[task] = self.r2(task, self.train.theta(partners, task).mean(dim=0).expand(num_images, -1))
        return found

    def val_partners(self) -> Tensor:
        """Returns the second images of the held-out pairs, the same for every encoder."""
        return self.val.partners(torch.Generator().manual_seed(SEED))

    def accuracy(self, predicted: Tensor) -> dict[str, float]:
        return {"top1": 100 * (predicted == self.val.images.labels).double().mean().item()}

    def r2(self, task: str, predicted: Tensor) -> dict[str, Any]:
        scores = r2_scores(predicted, self.val.theta(self.val_partners(), task))
        components = dict(zip(REGRESSIONS[task], scores.components, strict=True))
        return {"r2_pooled": scores.pooled, "r2_mean": scores.mean, "r2_components": components}


def read_views(images: LabelledImages, num_views: int, max_objects: int | None) -> Views:
    """Chooses images of a split and reads their latents.

    Raises:
        DataError: the data set is no 3DIEBench, or latents cannot be read.
    """
    dataset = images.dataset
    if not isinstance(dataset, ThreeDIEBench):
        raise DataError(
            f"eval 3diebench needs data in its layout, 3DIEBench:split=...:root=..., not {dataset.data_string!r}"
        )
    per_object = min(num_views, dataset.views)
    if per_object < 2:
        raise DataError(f"--views {num_views}: a pair needs at least 2 images of an object")
    objects = torch.from_numpy(fixed_subset(len(dataset.objects), max_objects or len(dataset.objects)))
    chosen = images.take((objects[:, None] * dataset.views + torch.arange(per_object)).flatten())
    try:
        latents = np.stack([dataset.latents(index) for index in chosen.indices.tolist()])
    except UnreadableImage as error:
        raise DataError(f"Cannot evaluate on an image without its latents: {error}. Restore it.") from None
    return Views(chosen, latents, per_object)


def pairs_of(rows: Tensor, partners: Tensor) -> Tensor:
    """Joins features [N, F] of images with those of their partners: [N, 2F]."""
    return torch.cat([rows, rows[partners.to(rows.device)]], dim=1)


def results_table(by_name: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    rows = []
    for name, parts in by_name.items():
        for part, tasks in parts.items():
            cells = [tasks[task][key] if task in tasks else None for task, key, _ in TABLE]
            formats = (
                "" if cell is None else f"{cell:.{2 if number == 0 else 3}f}" for number, cell in enumerate(cells)
            )
            rows.append([name, part, *formats])
    return format_table(["features", "part", *(title for _, _, title in TABLE)], rows)


if __name__ == "__main__":
    main()
