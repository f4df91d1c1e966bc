"""Makes a small file of weights for torch.hub from a run, and enters it in the manifest beside it.

    python tools/release_weights.py runs/mine mine --output weights --data "my 10,000 images" --default \\
        --result "20-NN top-1 %=31.5" --notes "a test of the program, not for use"

The file holds the teacher's backbone, and the projection where the run had the task, in half precision. Its header
holds the run's config, without the paths of data and weights. Afterwards the file is loaded through its entry point of
torch.hub, and the features are compared.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_eq.evaluation.encoder import find_checkpoint, load_encoder
from dinov2_eq.hub import ENTRY_POINTS, entry_point_of
from dinov2_eq.hub.manifest import Release, read_manifest, write_manifest
from dinov2_eq.models.convert import backbone_arguments
from dinov2_eq.models.weight_files import file_sha256, read_checkpoint, write_safetensors

PARTS = ("backbone", "projection")
PATHS = {
    "train": ["dataset_path"],
    "evaluation": ["knn_train_dataset", "knn_val_dataset"],
    "student": ["pretrained_weights"],
}
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
    checkpoint = read_checkpoint(path)
    if checkpoint.config is None or "teacher" not in checkpoint.content:
        raise ValueError(f"{path} is no teacher checkpoint with its config inside; give a run of this version")
    student = checkpoint.config["student"]
    entry_point = entry_point_of(student["arch"], student["patch_size"], student["num_register_tokens"])
    releases = read_manifest(args.output)
    others = (name for name, release in releases.items() if release.entry_point == entry_point and release.default)
    if args.default and (other := next((name for name in others if name != args.name), None)):
        raise ValueError(f"{other} is the default of {entry_point} already; leave --default out")
    tensors = to_half(checkpoint.content["teacher"])
    file = args.output / f"{args.name}.safetensors"
    header = {
        "config": json.dumps(without_paths(checkpoint.config)),
        "step": str(checkpoint.step),
        "licence": args.licence,
    }
    write_safetensors(file, tensors, header)
    releases[args.name] = Release(
        entry_point=entry_point,
        default=args.default,
        file=file.name,
        url=args.url,
        size=file.stat().st_size,
        sha256=file_sha256(file),
        dtype="float16",
        contains=[part for part in PARTS if any(name.startswith(f"{part}.") for name in tensors)],
        architecture={**backbone_arguments(student), "img_size": checkpoint.config["crops"]["global_crops_size"]},
        data=args.data,
        steps=checkpoint.step,
        results=dict(args.result),
        licence=args.licence,
        notes=args.notes,
    )
    write_manifest(args.output, releases)
    similarity = compare(path, file, entry_point)
    print(f"{file}: {file.stat().st_size / 1e6:.2f} MB, {entry_point}, {', '.join(releases[args.name].contains)}")
    print(f"class tokens of noise, the run's and the release's: cosine at least {similarity:.6f}")


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config as anyone may see it: where its owner keeps files is blank."""
    return {
        section: {key: "" if key in PATHS.get(section, ()) else value for key, value in values.items()}
        for section, values in config.items()
    }


def to_half(teacher: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is released of a teacher, in half precision.

    Raises:
        ValueError: a value that half precision cannot hold.
    """
    tensors = {name: tensor.half() for name, tensor in teacher.items() if name.split(".")[0] in PARTS}
    if too_large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{too_large[0]} has values beyond half precision, 65504")
    return tensors


@torch.inference_mode()
def compare(checkpoint: Path, file: Path, entry_point: str) -> float:
    """The smallest cosine between class tokens of the checkpoint and of the released file."""
    encoder = load_encoder(checkpoint)
    images = torch.randn(8, 3, encoder.image_size, encoder.image_size, generator=torch.Generator().manual_seed(0))
    released = ENTRY_POINTS[entry_point](weights=file)
    return torch.cosine_similarity(encoder.backbone(images), released(images)).min().item()


if __name__ == "__main__":
    main()
