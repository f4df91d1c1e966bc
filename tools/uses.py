"""Two uses of features that know how an image is turned; each prints a table, writes it and draws a picture.

angle:      estimates the rotation between two photographs of one thing, taken in different light.
retrieval:  finds the image most like another one, where its orientation counts and where only its class does.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from dinov2_eq.data.datasets import ImageDataset, build_dataset, require_labels
from dinov2_eq.data.loaders import fixed_subset, read_to_evaluate, resize_and_crop
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.evaluation.command_line import format_table, positive
from dinov2_eq.evaluation.encoder import Encoder, load_encoder
from dinov2_eq.evaluation.side_by_side import name_encoders, with_untrained
from dinov2_eq.files import replace_text
from dinov2_eq.probes.cosine import nearest_neighbours
from dinov2_eq.probes.features import WIDTHS, pooled_parts
from dinov2_eq.probes.transform_regression import regress_transform

MAX_ANGLE_DEG = 45.0
ROTATION = build_transform("rotation", max_angle_deg=MAX_ANGLE_DEG)
LIGHT = build_transform("color_jitter", max_color=0.2, max_hue=0.02)  # by how much the second photograph differs
ORIENTATIONS_DEG = (-40.0, -20.0, 0.0, 20.0, 40.0)
NUM_SHOWN = 8
BATCH_SIZE = 256


class Photographs(NamedTuple):
    """Squares that are larger than what the encoder sees, so that a rotation shows no border."""

    canvases: Tensor  # [N, 3, C, C] in [0, 1]
    size: int  # S, of what the encoder sees

    def turned(self, degrees: Tensor) -> Tensor:
        """Returns all of them turned by `degrees` [N], [N, 3, S, S]; 0 only crops."""
        return ROTATION.apply(self.canvases, degrees[:, None], (self.size, self.size))

    def repeated(self, times: int) -> "Photographs":
        return Photographs(self.canvases.repeat(times, 1, 1, 1), self.size)

    def __len__(self) -> int:
        return len(self.canvases)


class Outcome(NamedTuple):
    header: list[str]
    rows: list[list[str]]
    figure: Figure


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/uses.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    uses = parser.add_subparsers(dest="use", required=True)
    for use, function in (("angle", estimate_angles), ("retrieval", retrieve)):
        command = uses.add_parser(use)
        command.set_defaults(function=function)
        command.add_argument("--encoder", nargs="+", required=True, help="runs or files of weights, compared in turn")
        command.add_argument("--val-dataset", required=True, help="data string of the images to test with")
        command.add_argument("--max-images", type=positive, default=1000, help="of each dataset")
        command.add_argument("--seed", type=int, default=0, help="of angles, light and the head")
        command.add_argument("--output", type=Path, required=True, help="PNG file; the numbers go next to it, as .json")
        if use == "angle":
            command.add_argument("--train-dataset", required=True, help="data string of the images to learn from")
            command.add_argument("--draws", type=positive, default=4, help="pairs of each training image")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    encoders = with_untrained(name_encoders(args.encoder, [load_encoder(source) for source in args.encoder]))
    sizes = {encoder.image_size for encoder in encoders.values()}
    if len(sizes) > 1:
        raise ValueError(
            f"--encoder: they were trained with images of {sorted(sizes)} pixels; compare those of one size"
        )
    header, rows, figure = args.function(args, encoders, sizes.pop())
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output)
    given = {name: value for name, value in vars(args).items() if name not in ("function", "output")}
    numbers = [dict(zip(header, row, strict=True)) for row in rows]
    replace_text(args.output.with_suffix(".json"), json.dumps({**given, "rows": numbers}, indent=1) + "\n")
    print(format_table(header, rows))
    print(args.output)


def estimate_angles(args: argparse.Namespace, encoders: dict[str, Encoder], size: int) -> Outcome:
    """A small head learns the angle from the features of both photographs; errors are those on other images."""
    generator = torch.Generator().manual_seed(args.seed)
    train = read(build_dataset(args.train_dataset), args.max_images, size).repeated(args.draws)
    val = read(build_dataset(args.val_dataset), args.max_images, size)
    train_angles, val_angles = (ROTATION.sample(len(images), generator)[:, 0] for images in (train, val))
    train_pairs, val_pairs = (
        (images.turned(torch.zeros(len(images))), in_other_light(images.turned(angles), generator))
        for images, angles in ((train, train_angles), (val, val_angles))
    )
    rows, estimates = [], {}
    for name, encoder in encoders.items():
        views = [features(encoder, view) for view in (*train_pairs, *val_pairs)]
        for tokens in views[0]:
            first, second, val_first, val_second = (view[tokens] for view in views)
            inputs = [torch.cat(pair, dim=1) for pair in ((first, second), (val_first, val_second))]
            targets = train_angles[:, None] / MAX_ANGLE_DEG
            shares = regress_transform(inputs[0], targets, inputs[1], seed=args.seed, hidden_dim=256, epochs=20)[:, 0]
            found = MAX_ANGLE_DEG * shares
            estimates.setdefault(name, found)  # of the first tokens
            rows.append([name, tokens, *errors(found - val_angles)])
    rows.append(["(always 0)", "", *errors(val_angles)])
    columns = {"first": val_pairs[0], "second": val_pairs[1]}
    labels = {"second": val_angles}
    for name, found in estimates.items():
        columns[f"first, turned as\n{name} says"] = val.turned(found)
        labels[f"first, turned as\n{name} says"] = found
    return Outcome(["encoder", "tokens", "median error, degrees", "within 10 degrees, %"], rows, draw(columns, labels))


def retrieve(args: argparse.Namespace, encoders: dict[str, Encoder], size: int) -> Outcome:
    """Each image, in one of five orientations, finds its nearest neighbour among all others in all orientations."""
    generator = torch.Generator().manual_seed(args.seed)
    dataset = build_dataset(args.val_dataset)
    labels = torch.as_tensor(require_labels(dataset, "retrieval")[fixed_subset(len(dataset), args.max_images)])
    images = read(dataset, args.max_images, size)
    number, poses = len(images), torch.tensor(ORIENTATIONS_DEG)
    gallery = torch.cat([images.turned(torch.full((number,), degrees)) for degrees in ORIENTATIONS_DEG])
    own, pose = torch.arange(number), torch.randint(len(poses), (number,), generator=generator)
    queries = pose * number + own  # rows of the gallery
    rows, columns, degrees = [], {"query": gallery[queries]}, {"query": poses[pose]}
    for name, encoder in encoders.items():
        for tokens, known in features(encoder, gallery).items():
            nearest = nearest_neighbours(known[queries], known, len(poses) + 1)[1]
            others = (nearest % number != own[:, None]).int().argmax(dim=1)  # the first that is not the image itself
            found = nearest[own, others]
            same_pose, same_class = found // number == pose, labels[found % number] == labels
            rows.append([name, tokens, percent(same_pose), percent(same_class)])
            columns[f"{name},\n{tokens}"], degrees[f"{name},\n{tokens}"] = gallery[found], poses[found // number]
    alike = (labels[:, None] == labels)[~torch.eye(number, dtype=torch.bool)]
    rows.append(["(chance)", "", f"{100 / len(poses):.1f}", percent(alike)])
    return Outcome(["encoder", "tokens", "same orientation, %", "same class, %"], rows, draw(columns, degrees))


def read(dataset: ImageDataset, max_images: int, size: int) -> Photographs:
    """Reads squares large enough to be turned, from a fixed choice of the images."""
    side, _ = ROTATION.canvas_size((size, size))
    prepare = resize_and_crop(side, side)
    pixels = [prepare(read_to_evaluate(dataset, index)) for index in fixed_subset(len(dataset), max_images)]
    return Photographs(torch.stack(pixels).float() / 255, size)


def in_other_light(images: Tensor, generator: torch.Generator) -> Tensor:
    return LIGHT.apply(images, LIGHT.sample(len(images), generator), images.shape[-2:])


def features(encoder: Encoder, images: Tensor) -> dict[str, Tensor]:
    """Encodes images [N, 3, S, S] in [0, 1]: by tokens, in rows [N, F].

    The patches in quarters, the class token, and the quarters of the equivariant half where there is one.
    """
    parts = ("grid2", "cls")
    look = {"mean": encoder.mean, "std": encoder.std}
    batches = [pooled_parts(encoder.backbone, batch, parts, **look) for batch in images.split(BATCH_SIZE)]
    found = {part: torch.cat(rows) for part, rows in zip(parts, zip(*batches, strict=True), strict=True)}
    if encoder.equivariant is not None:
        with torch.no_grad():
            found["equi_grid2"] = encoder.equivariant(found["grid2"].unflatten(1, (WIDTHS["grid2"], -1))).flatten(1)
    return found


def errors(degrees: Tensor) -> list[str]:
    """Returns the median of absolute errors, and how many per cent are below 10 degrees."""
    size = degrees.abs()
    return [f"{size.median():.1f}", f"{100 * (size < 10).double().mean():.0f}"]


def percent(hits: Tensor) -> str:
    return f"{100 * hits.double().mean():.1f}"


def draw(rows: dict[str, Tensor], degrees: dict[str, Tensor]) -> Figure:
    """Draws the first images of each row, with the angles of the rows that have some."""
    shown = min(NUM_SHOWN, *(len(images) for images in rows.values()))
    figure = Figure(figsize=(1.2 * shown + 1.8, 1.4 * len(rows)), dpi=120, layout="constrained")
    grid = figure.subplots(len(rows), shown, squeeze=False)
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        for index, axes in enumerate(axes_row):
            axes.imshow(np.asarray(images[index].permute(1, 2, 0).clamp(0, 1)), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            if name in degrees:
                axes.set_title(f"{degrees[name][index]:.0f}°", fontsize=8)
    return figure


if __name__ == "__main__":
    main()
