"""Exports the teacher's backbone of a run for other programs, and compares each export with the original.

    dinov2-eq export OUT --to timm hf onnx --output-dir exports

Every format gets its own folder below the output folder, with the weights, README.md with the code that loads them, and
export.json with the measured differences.
"""

import argparse
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from copy import copy, deepcopy
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dinov2_eq.evaluation.command_line import format_table
from dinov2_eq.evaluation.encoder import Encoder, find_checkpoint, load_encoder
from dinov2_eq.files import check_writable, read_json, replace_text
from dinov2_eq.hub import ENTRY_POINTS
from dinov2_eq.hub.export_card import (
    CHECK_COLUMNS,
    check_rows,
    loading_code,
    measurements,
    model_card,
    to_json,
    without_paths,
)
from dinov2_eq.hub.export_names import to_hugging_face, to_timm
from dinov2_eq.hub.export_onnx import write_onnx
from dinov2_eq.hub.export_release import write_release
from dinov2_eq.hub.manifest import read_manifest
from dinov2_eq.logging import setup_logging
from dinov2_eq.models import DinoVisionTransformer
from dinov2_eq.models.convert import adapt, to_dinov2
from dinov2_eq.models.weight_files import read_checkpoint, read_weights, write_safetensors
from dinov2_eq.report.runs import read_metrics
from dinov2_eq.train.online_knn import KNN_TOP1

RECORD, CARD = "export.json", "README.md"
TOLERANCE = 1e-4  # of the largest feature
RESIZED = (
    "Position tables are resized as in {}: to the exact size, {}. If the training resized them differently, features "
    "at other image sizes differ, see the second column below."
)
SMALL_IMAGES = 64  # pixels; larger images are cropped from 256/224 of their side, as in the evaluations
Tokens = tuple[Tensor, Tensor]  # class token [B, D], patch tokens [B, N, D]
Features = Callable[[Tensor], Tokens]


class Target(NamedTuple):
    """A format of exports."""

    file: str  # name of the weight file
    packages: tuple[str, ...]  # needed to write and to load the export
    write: Callable[[Path, Encoder], None]  # writes to a folder
    read: Callable[[Path, Encoder], Features]  # loads the export with its own library
    note: str
    # Applies the known changes of the format to the original, so that any other difference is an error.
    as_exported: Callable[[DinoVisionTransformer], DinoVisionTransformer] = lambda backbone: backbone


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dinov2-eq export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", help="run folder, whose newest teacher is exported, or a teacher checkpoint")
    add("--to", nargs="+", action="extend", required=True, choices=TARGETS, metavar="FORMAT", help=", ".join(TARGETS))
    add("--output-dir", type=Path, required=True, metavar="DIR", help="folder for the folders of the formats")
    add("--config-file", metavar="YAML", help="config of a checkpoint that contains none")
    add("--force", action="store_true", help="replace existing exports")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    setup_logging()
    for chatty in ("onnx_ir", "onnxscript"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    targets = list(dict.fromkeys(args.to))
    for target in targets:
        require_packages(target)
        require_free(args.output_dir / target, args.force)
    path = find_checkpoint(Path(args.checkpoint))
    check_writable(args.output_dir)
    encoder = load_encoder(path, args.config_file)
    if not encoder.config:
        raise ValueError(
            f"{path} contains no training config, so it is not a teacher checkpoint of this project; if the config was "
            "removed, pass --config-file with the YAML it was trained with"
        )
    if not isinstance(encoder.backbone, DinoVisionTransformer):
        raise ValueError(
            f"{path} is a {encoder.config['student']['arch']}; only vision transformers can be exported. Load a ResNet "
            "into torchvision's model: the tensors of teacher_checkpoint.pth have its names behind 'backbone.'"
        )
    run = read_run(path.resolve())
    for target in targets:
        export(target, encoder, run, args.output_dir / target)


def export(target: str, encoder: Encoder, run: dict[str, Any], folder: Path) -> None:
    """Writes and checks the folder of a format, completely or not at all, and prints the differences.

    Raises:
        ValueError: the format cannot express the backbone, or the export computes other features.
    """
    temporary = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        file, packages, write, read, note, as_exported = TARGETS[target]
        write(temporary, encoder)
        checks = compare_features(read(temporary, encoder), encoder, as_exported(encoder.backbone))
        if wrong := [check for check in checks if not check["difference"] <= TOLERANCE * check["largest"]]:
            raise ValueError(
                f"The features of the {target} export differ by {wrong[0]['difference']:.2g} at {wrong[0]['height']} x "
                f"{wrong[0]['width']} pixels; nothing was kept. Please report it, with the config of the run"
            )
        record = {
            "format": target,
            "step": encoder.step,
            "checks": checks,
            "versions": {package: metadata.version(package) for package in ("torch", *packages)},
        }
        described = {"config": encoder.config, "step": encoder.step, "parameters": encoder.description["parameters"]}
        code = loading_code(target, file, encoder.config)
        replace_text(temporary / CARD, model_card(target, code, described, run, checks, note))
        (temporary / RECORD).write_text(to_json(record), encoding="utf-8")
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(format_table([f"{target}: pixels", *CHECK_COLUMNS.values()], check_rows(checks)))
    print(folder)


def require_packages(target: str) -> None:
    """Raises ValueError if a package that the format needs is missing."""
    if missing := [package for package in TARGETS[target].packages if find_spec(package) is None]:
        raise ValueError(f"--to {target} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def require_free(folder: Path, force: bool) -> None:
    """Raises FileExistsError if the folder exists and may not be replaced: without --force, or if it is no export."""
    if not folder.exists():
        return
    if not force:
        raise FileExistsError(f"{folder} exists; choose another --output-dir, or --force to replace it")
    if not (folder / RECORD).is_file():
        raise FileExistsError(f"{folder} is not an earlier export: it has no {RECORD}; choose another --output-dir")


@torch.inference_mode()
def compare_features(features: Features, encoder: Encoder, as_exported: DinoVisionTransformer) -> list[dict[str, Any]]:
    """Compares features on random images: square images of the training size, wide and tall ones.

    Args:
        features: computed by the export.
        as_exported: the encoder's backbone with the known changes of the format.

    Returns:
        for each size height, width, difference (to `as_exported`), difference_as_trained (to the encoder), and
        largest, the largest feature.
    """
    size, patch = encoder.image_size, encoder.backbone.patch_size
    short, long = patch * max(1, size // patch // 2), size + 3 * patch
    generator, checks = torch.Generator().manual_seed(0), []
    for height, width in ((size, size), (short, long), (long, short)):
        images = torch.randn(2, 3, height, width, generator=generator)
        exported, expected, trained = (
            each(images) for each in (features, features_of(as_exported), features_of(encoder.backbone))
        )
        checks.append(
            {
                "height": height,
                "width": width,
                "difference": largest_difference(exported, expected),
                "difference_as_trained": largest_difference(exported, trained),
                "largest": max(tokens.abs().max().item() for tokens in trained),
            }
        )
    return checks


def largest_difference(first: Tokens, second: Tokens) -> float:
    """Largest absolute difference between two sets of features; NaN if any feature is."""
    differences = [(one - other).abs().max() for one, other in zip(first, second, strict=True)]
    return torch.stack(differences).max().item()  # Python's max could lose a NaN


def resizing(backbone: DinoVisionTransformer, antialias: bool) -> DinoVisionTransformer:
    """A copy of the backbone that resizes position tables to the exact size, as other libraries do."""
    changed = copy(backbone)
    changed.interpolate_antialias, changed.interpolate_offset = antialias, 0.0
    return changed


def in_half_precision(backbone: DinoVisionTransformer) -> DinoVisionTransformer:
    """A copy of the backbone with weights rounded to half precision, which computes in float32."""
    return deepcopy(backbone).half().float()


def read_run(checkpoint: Path) -> dict[str, Any]:
    """Reads what the run folder of a checkpoint contains: processes, environment, k-NN in training, results files."""
    folder = next(
        (parent for parent in checkpoint.parents[:3] if (parent / "config.yaml").is_file()), checkpoint.parent
    )
    step = checkpoint.parent.name.removeprefix("training_")
    environment, curve = folder / "environment.json", folder / "training_metrics.jsonl"
    knn = [
        {"step": line["step"], "top1": line[KNN_TOP1]}
        for line in read_metrics(curve)
        if KNN_TOP1 in line and (not step.isdigit() or line["step"] <= int(step))
    ]
    files = sorted({file for place in (folder, checkpoint.parent) for file in place.glob("results_eval_*.json")})
    return {
        "processes": len(list(folder.glob("logs/log.*.txt"))) or None,  # each process has its own log
        "environment": read_json(environment) if environment.is_file() else {},
        "knn": knn[-1] if knn else None,
        "results": {file.name: read_json(file) for file in files},
    }


def write_backbone(folder: Path, encoder: Encoder) -> None:
    torch.save(encoder.backbone.state_dict(), folder / TARGETS["backbone"].file)


def read_backbone(folder: Path, encoder: Encoder) -> Features:
    backbone = encoder.untrained()
    weights, _ = adapt(to_dinov2(read_weights(folder / TARGETS["backbone"].file)), backbone)
    backbone.load_state_dict(weights)
    return features_of(backbone.eval())


def write_with_config(folder: Path, encoder: Encoder) -> None:
    if encoder.step is None:
        raise ValueError("This checkpoint does not contain its step, which this format needs; use --to backbone")
    header = {"config": json.dumps(without_paths(encoder.config)), "step": str(encoder.step)}
    write_safetensors(folder / TARGETS["safetensors"].file, encoder.backbone.state_dict(), header)


def write_timm(folder: Path, encoder: Encoder) -> None:
    weights, config = to_timm(encoder.backbone)
    size = encoder.image_size
    config["pretrained_cfg"] = {
        "num_classes": 0,
        "input_size": [3, size, size],
        "fixed_input_size": False,
        "interpolation": "bicubic",
        "crop_pct": size / _resized(size),
        "mean": encoder.mean,
        "std": encoder.std,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    _write_weights_and_config(folder, weights, config)


def write_hugging_face(folder: Path, encoder: Encoder) -> None:
    _write_weights_and_config(folder, *to_hugging_face(encoder.backbone))
    size = encoder.image_size
    preprocessing = {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": _resized(size)},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": encoder.mean,
        "image_std": encoder.std,
    }
    (folder / "preprocessor_config.json").write_text(to_json(preprocessing), encoding="utf-8")


def _write_weights_and_config(folder: Path, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    (folder / "config.json").write_text(to_json(config), encoding="utf-8")


def _resized(size: int) -> int:
    return size if size <= SMALL_IMAGES else round(size * 256 / 224)


def write_graph(folder: Path, encoder: Encoder) -> None:
    about = {"image_size": encoder.image_size, "mean": encoder.mean, "std": encoder.std, "step": encoder.step}
    write_onnx(folder / TARGETS["onnx"].file, encoder.backbone, about)


def read_graph(folder: Path, encoder: Encoder) -> Features:
    from onnxruntime import InferenceSession

    session = InferenceSession(folder / TARGETS["onnx"].file, providers=["CPUExecutionProvider"])
    return lambda images: tuple(map(torch.from_numpy, session.run(None, {"images": images.numpy()})))


def read_as(source: str) -> Callable[[Path, Encoder], Features]:
    """Makes a reader that uses `load_encoder`; {folder} in `source` stands for the folder of the export."""
    return lambda folder, _: features_of(load_encoder(source.format(folder=folder)).backbone)


def features_of(backbone: torch.nn.Module) -> Features:
    def features(images: Tensor) -> Tokens:
        tokens = backbone(images, is_training=True)
        return tokens["x_norm_clstoken"], tokens["x_norm_patchtokens"]

    return features


def write_for_hub(folder: Path, encoder: Encoder) -> None:
    path = Path(encoder.description["checkpoint"])
    measured = measurements(read_run(path), encoder.step)
    results = {f"{file}: {words}": number for file, numbers in measured.items() for words, number in numbers}
    data = without_paths(encoder.config["train"]["dataset_path"])
    write_release(folder, "model", read_checkpoint(path), data=data, results=results, notes=f"see {CARD}")


def read_for_hub(folder: Path, encoder: Encoder) -> Features:
    [release] = read_manifest(folder).values()
    return features_of(ENTRY_POINTS[release.entry_point](weights=folder / release.file))


TARGETS = {
    "backbone": Target(
        "backbone.pth",
        (),
        write_backbone,
        read_backbone,
        "Tensors have DINOv2's names, with unchunked blocks. DINOv2's own DinoVisionTransformer loads them too.",
    ),
    "hub": Target(
        "model.safetensors",
        ("safetensors",),
        write_for_hub,
        read_for_hub,
        "Weights are in half precision. If the run had the task, `projection=True` makes the entry point also compute "
        "the invariant and equivariant features. `manifest.json` is the entry for `weights/` of the checkout.",
        in_half_precision,
    ),
    "timm": Target(
        "model.safetensors",
        ("timm", "safetensors"),
        write_timm,
        read_as("timm:local-dir:{folder}"),
        RESIZED.format("timm", "with antialiasing"),
        lambda backbone: resizing(backbone, antialias=True),
    ),
    "hf": Target(
        "model.safetensors",
        ("transformers", "safetensors"),
        write_hugging_face,
        read_as("hf:{folder}"),
        RESIZED.format("transformers", "with antialiasing only for models with registers"),
        lambda backbone: resizing(backbone, antialias=backbone.num_register_tokens > 0),
    ),
    "safetensors": Target(
        "model.safetensors",
        ("safetensors",),
        write_with_config,
        read_as("{folder}/model.safetensors"),
        "The header of the file contains the training config and the step.",
    ),
    "onnx": Target(
        "model.onnx",
        ("onnx", "onnxscript", "onnxruntime"),
        write_graph,
        read_graph,
        "Takes any number of images, whose sides are multiples of the patch size.",
    ),
}


if __name__ == "__main__":
    main()
