"""Releases the weights of a run for torch.hub: writes a small file, and its entry in the manifest next to it.

    python tools/release_weights.py runs/mine mine --output weights --data "my 10,000 images" --default \\
        --result "20-NN top-1 %=31.5" --notes "a test of the program, not for use"

The file contains the teacher's backbone in half precision, and the projection if the run had the task. Its header
contains the run's config, without the folders of data and weights. Before anything is released, a trial file is loaded
through its entry point of torch.hub and its features are compared with the run's.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dinov2_eq.evaluation.encoder import find_checkpoint, load_encoder
from dinov2_eq.hub import ENTRY_POINTS
from dinov2_eq.hub.export_release import write_release
from dinov2_eq.models.weight_files import read_checkpoint

MIN_COSINE = 0.999
REQUIRED = {"required": True, "default": argparse.SUPPRESS}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/release_weights.py",
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="run folder, whose newest teacher is used, or a teacher checkpoint")
    parser.add_argument("name", help="name of the release, as in torch.hub.load(..., weights=NAME)")
    parser.add_argument("--output", type=Path, default="weights", metavar="DIR", help="folder of the manifest")
    parser.add_argument("--data", **REQUIRED, metavar="TEXT", help="training data")
    parser.add_argument("--notes", **REQUIRED, metavar="TEXT", help="what it is good for and what not, in a sentence")
    parser.add_argument(
        "--result", action="append", type=result, default=[], metavar="NAME=VALUE", help="a measurement, repeatable"
    )
    parser.add_argument("--licence", default="Apache-2.0", help="SPDX name")
    parser.add_argument("--url", help="where else the file can be downloaded; None: nowhere")
    parser.add_argument("--default", action="store_true", help="let pretrained=True load it for its entry point")
    return parser


def result(text: str) -> tuple[str, float]:
    """Parses the value of --result."""
    name, _, value = text.rpartition("=")
    try:
        if name:
            return name, float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"write NAME=NUMBER, got {text!r}")


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    path = find_checkpoint(args.run)
    write = partial(
        write_release,
        name=args.name,
        checkpoint=read_checkpoint(path),
        data=args.data,
        results=dict(args.result),
        notes=args.notes,
        licence=args.licence,
        url=args.url,
        default=args.default,
    )
    with TemporaryDirectory() as trial:
        release = write(Path(trial))
        similarity = smallest_cosine(path, Path(trial, release.file), release.entry_point)
    if not similarity >= MIN_COSINE:
        raise ValueError(
            f"Nothing was released: in half precision, the cosine between class tokens minus their mean and those of "
            f"{path} is {similarity:.4f}, but must be at least {MIN_COSINE}"
        )
    release = write(args.output)
    file = args.output / release.file
    print(f"{file}: {release.size / 1e6:.2f} MB, {release.entry_point}, {', '.join(release.contains)}")
    print(f"smallest cosine between class tokens of run and release, minus their mean, on noise: {similarity:.6f}")


@torch.inference_mode()
def smallest_cosine(checkpoint: Path, file: Path, entry_point: str) -> float:
    """Smallest cosine between class tokens of the checkpoint and of the released file, each minus their mean.

    Without subtracting the mean, the cosine would be near 1 for any weights whose tokens are nearly alike.
    """
    encoder = load_encoder(checkpoint)
    images = torch.randn(8, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    released = ENTRY_POINTS[entry_point](weights=file)
    ours, theirs = (model(images).double() for model in (encoder.backbone, released))
    return torch.cosine_similarity(ours - ours.mean(dim=0), theirs - theirs.mean(dim=0)).min().item()


if __name__ == "__main__":
    main()
