"""Makes a small file of weights for torch.hub from a run, and enters it in the manifest beside it.

    python tools/release_weights.py runs/mine mine --output weights --data "my 10,000 images" --default \\
        --result "20-NN top-1 %=31.5" --notes "a test of the program, not for use"

The file holds the teacher's backbone, and the projection where the run had the task, in half precision. Its header
holds the run's config, without the folders of data and weights. Nothing is released before a file like it was loaded
through its entry point of torch.hub and gave the run's features.
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
    parser.add_argument("run", type=Path, help="run folder, whose newest teacher is taken, or a teacher checkpoint")
    parser.add_argument("name", help="of the release: torch.hub.load(..., weights=NAME)")
    parser.add_argument("--output", type=Path, default="weights", metavar="DIR", help="folder of the manifest")
    parser.add_argument("--data", **REQUIRED, metavar="TEXT", help="what it was trained on")
    parser.add_argument("--notes", **REQUIRED, metavar="TEXT", help="what it is and is not, in a sentence")
    parser.add_argument(
        "--result", action="append", type=result, default=[], metavar="NAME=VALUE", help="a measurement, repeatable"
    )
    parser.add_argument("--licence", default="Apache-2.0", help="SPDX name")
    parser.add_argument("--url", help="where the file can be had as well; None: from the checkout only")
    parser.add_argument("--default", action="store_true", help="what pretrained=True gives for its entry point")
    return parser


def result(text: str) -> tuple[str, float]:
    """Type of --result."""
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
        similarity = compare(path, Path(trial, release.file), release.entry_point)
    if not similarity >= MIN_COSINE:
        raise ValueError(
            f"Nothing was released: in half precision, class tokens minus their mean have a cosine of {similarity:.4f} "
            f"only to those of {path}, and should have {MIN_COSINE}"
        )
    release = write(args.output)
    file = args.output / release.file
    print(f"{file}: {release.size / 1e6:.2f} MB, {release.entry_point}, {', '.join(release.contains)}")
    print(f"class tokens of noise minus their mean, the run's and the release's: cosine at least {similarity:.6f}")


@torch.inference_mode()
def compare(checkpoint: Path, file: Path, entry_point: str) -> float:
    """The smallest cosine between class tokens of the checkpoint and of the released file, each minus their mean.

    What all images share says nothing: it alone gives a cosine near 1 where the tokens are nearly alike.
    """
    encoder = load_encoder(checkpoint)
    images = torch.randn(8, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    released = ENTRY_POINTS[entry_point](weights=file)
    ours, theirs = (model(images).double() for model in (encoder.backbone, released))
    return torch.cosine_similarity(ours - ours.mean(dim=0), theirs - theirs.mean(dim=0)).min().item()


if __name__ == "__main__":
    main()
