"""Writes a teacher as a small file for `hubconf.py`, and its entry in the manifest next to it."""

import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from dinov2_eq.files import file_sha256
from dinov2_eq.hub.backbones import entry_point_of
from dinov2_eq.hub.export_card import LICENCE, without_paths
from dinov2_eq.hub.manifest import Release, read_manifest, write_manifest
from dinov2_eq.models.convert import backbone_arguments
from dinov2_eq.models.weight_files import Checkpoint, write_safetensors

PARTS = ("backbone", "projection")


def write_release(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    *,
    data: str,
    results: Mapping[str, float],
    notes: str,
    licence: str = LICENCE,
    url: str | None = None,
    default: bool = False,
) -> Release:
    """Writes `<folder>/<name>.safetensors` in half precision, with the run's config in its header, and the manifest.

    Args:
        name: name of the release; an existing release of that name is replaced.
        data: training data.
        results: measurements by name.
        notes: what the release is good for and what not.
        url: where else the file is available.
        default: whether `pretrained=True` loads it for its entry point.

    Raises:
        ValueError: the checkpoint lacks teacher, config or step, its architecture has no entry point, there is another
            default, or values exceed half precision.
        OSError: the folder cannot be written.
    """
    config, teacher = checkpoint.config, checkpoint.content.get("teacher")
    if config is None or teacher is None or checkpoint.step is None:
        raise ValueError(
            "This is not a teacher checkpoint with config and step, as training writes it in eval/training_<step>/"
        )
    student = config["student"]
    entry_point = entry_point_of(student["arch"], student["patch_size"], student["num_register_tokens"])
    releases = read_manifest(folder)
    others = (known for known, release in releases.items() if release.entry_point == entry_point and release.default)
    if default and (other := next((known for known in others if known != name), None)):
        raise ValueError(f"{other} is already the default of {entry_point}, and there can only be one; omit --default")
    tensors = to_half(teacher)
    file = folder / f"{name}.safetensors"
    header = {"config": json.dumps(without_paths(config)), "step": str(checkpoint.step), "licence": licence}
    write_safetensors(file, tensors, header)
    releases[name] = Release(
        entry_point=entry_point,
        default=default,
        file=file.name,
        url=url,
        size=file.stat().st_size,
        sha256=file_sha256(file),
        dtype="float16",
        contains=[part for part in PARTS if any(key.startswith(f"{part}.") for key in tensors)],
        architecture={**backbone_arguments(student), "img_size": config["crops"]["global_crops_size"]},
        data=data,
        steps=checkpoint.step,
        results=dict(results),
        licence=licence,
        notes=notes,
    )
    write_manifest(folder, releases)
    return releases[name]


def to_half(teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts the released parts of a teacher to half precision.

    Raises:
        ValueError: a value exceeds half precision.
    """
    tensors = {name: tensor.half() for name, tensor in teacher.items() if name.split(".")[0] in PARTS}
    if too_large := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{too_large[0]} has values above 65504, the largest number in half precision")
    return tensors
