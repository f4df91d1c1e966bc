"""Encoders to evaluate: from a run, a file of weights or another library, or with random weights."""

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.equivariance.split import TokenSplit, projection_of, split_like
from dinov2_eq.models import BACKBONES, DinoVisionTransformer, build_backbone
from dinov2_eq.models.convert import adapt, backbone_arguments, describe_misfit, infer_architecture
from dinov2_eq.models.foreign_backbones import (
    IMAGENET_MEAN,
    IMAGENET_SIZE,
    IMAGENET_STD,
    LOADERS,
    Foreign,
    require_tokens,
)
from dinov2_eq.models.weight_files import instead_of_folder, read_checkpoint
from dinov2_eq.settings import StudentConfig

ADAPTABLE = {"pos_embed", "mask_token"}  # one is resized as by the backbone, the other is not used in evaluations
CHECKPOINTS = "eval/training_*/teacher_checkpoint.pth"
ANY_TRANSFORMER = "vit_small"  # the weights decide which one
SEED = 0  # of random weights
RANDOM = re.compile(r"(?P<arch>\w+)/(?P<patch_size>\d+)(?:@(?P<img_size>\d+))?")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    backbone: nn.Module  # in eval mode, on the CPU; interface as in `models.foreign_backbones`
    image_size: int  # side, in pixels, of the images it was trained with
    mean: list[float]  # pixel statistics, in [0, 1]
    std: list[float]
    config: dict[str, Any]  # the whole training config; {} if there is none
    step: int | None  # optimizer updates so far; None: unknown
    description: dict[str, Any]  # for results files: where it comes from and what it is
    untrained: Callable[[], nn.Module] | None = None  # builds the same architecture with fresh weights
    equivariant: nn.Linear | None = None  # from tokens to their equivariant half, on the CPU; None: never split
    invariant: nn.Linear | None = None  # likewise to the invariant half; None: that is the whole token


def load_encoder(source: str | Path, config_file: str | None = None) -> Encoder:
    """Loads an encoder with its own normalisation and image size.

    Args:
        source: one of
            a run folder: its newest `eval/training_<step>/teacher_checkpoint.pth`;
            a teacher checkpoint, or a released .safetensors file, with its config inside;
            a file of weights that `models.convert` knows: the architecture is inferred, pixels are ImageNet's;
            `timm:NAME`; `hf:NAME`, NAME may be a folder; `hub:REPO:NAME`, REPO may be a folder with a hubconf.py;
            `random:ARCH/PATCH[@SIZE]`, such as random:vit_small/16 (224 pixels), or `random:` before any of the above:
            the same architecture with the weights of seed 0.
        config_file: config for a file that carries none; a file's own must agree with it.

    Raises:
        FileNotFoundError: no such path, or a folder without a teacher checkpoint.
        ValueError: the weights or the config cannot be used or obtained, or contradict each other.
    """
    kind, _, rest = str(source).partition(":")
    if kind in (*LOADERS, "random") and rest and not Path(source).exists():
        if config_file:
            raise ValueError(f"--config-file {config_file} is for files of weights; {source} has a config of its own")
        return _load_random(rest) if kind == "random" else _load_foreign(str(source), kind, rest)
    return _load_file(str(source), find_checkpoint(Path(source)), config_file)


def random_encoder(encoder: Encoder, seed: int) -> Encoder:
    """Returns the same architecture with random weights; leaves torch's global generator unchanged."""
    return replace(
        encoder,
        backbone=_frozen(_seeded(encoder.untrained, seed)),
        equivariant=encoder.equivariant and _frozen(_seeded(partial(_fresh_half, encoder.equivariant), seed)),
        # With the same seed, halves of one size would be equal.
        invariant=encoder.invariant and _frozen(_seeded(partial(_fresh_half, encoder.invariant), seed + 1)),
        step=0,
        description={**encoder.description, "checkpoint": None, "step": 0, "loaded_tensors": 0, "random_seed": seed},
    )


def find_checkpoint(path: Path) -> Path:
    """Finds the newest teacher checkpoint of a run folder; returns a file unchanged."""
    if path.is_file():
        return path
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; give a run folder, or a teacher_checkpoint.pth below its eval/training_<step>/"
        )
    by_step = {file.parent.name.removeprefix("training_"): file for file in path.glob(CHECKPOINTS)}
    if steps := [step for step in by_step if step.isdigit()]:
        return by_step[max(steps, key=int)]
    if (path / "teacher_checkpoint.pth").is_file():  # an eval/training_<step> folder
        return path / "teacher_checkpoint.pth"
    raise FileNotFoundError(
        f"{path} holds no teacher checkpoint: a run folder has eval/training_<step>/teacher_checkpoint.pth, which "
        f"training writes every evaluation.eval_period_steps steps and at its end{instead_of_folder(path)}"
    )


def fingerprint(backbone: nn.Module) -> str:
    """Computes the SHA-256 of all weights, since the file at a path may change."""
    digest = hashlib.sha256()
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _load_file(source: str, path: Path, config_file: str | None) -> Encoder:
    content, own, step = read_checkpoint(path)
    config = _choose_config(path, own, config_file) if own or config_file else {}
    kind = BACKBONES.get(config.get("student", {}).get("arch"), BACKBONES[ANY_TRANSFORMER])
    try:
        weights = kind.weights_of(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if config:
        settings = _encoder_settings(config)
        image_size, mean, std = settings["global_crops_size"], settings["mean"], settings["std"]
        untrained = partial(build_backbone, **settings["student"], img_size=image_size)
        details = {"student": config["student"], "equivariance": config.get("equivariance")}
    else:
        details = infer_architecture(weights) | {"in_chans": 3}  # images are always read as RGB
        largest = IMAGENET_SIZE // details["patch_size"] * details["patch_size"]
        image_size, mean, std = min(details["img_size"], largest), IMAGENET_MEAN, IMAGENET_STD
        untrained = partial(DinoVisionTransformer, **details)
        logger.warning(
            "%s carries no config: its architecture is inferred, and images have %d pixels and ImageNet's mean and "
            "std, which may differ from its training",
            path,
            image_size,
        )
    backbone = untrained()
    num_tensors = _load_strictly(
        backbone, weights, path, is_ours=own is not None, is_described=bool(own or config_file)
    )
    split = _trained_split(content, backbone.embed_dim)
    return Encoder(
        backbone=_frozen(backbone),
        image_size=image_size,
        mean=mean,
        std=std,
        config=config,
        step=step,
        description=_describe(source, backbone, image_size, num_tensors)
        | {"checkpoint": str(path.resolve()), "step": step, **details},
        untrained=untrained,
        equivariant=split and split.equivariant,
        invariant=split.invariant if split and isinstance(split.invariant, nn.Linear) else None,
    )


def _trained_split(content: Mapping[str, Any], dim: int) -> TokenSplit | None:
    """Returns the trained maps from tokens [..., dim] to their two parts; None: they were never split."""
    weights = projection_of(content)
    if not weights:
        return None
    split = split_like(weights, dim)
    split.load_state_dict(weights)
    return _frozen(split)


def _fresh_half(trained: nn.Linear) -> nn.Linear:
    split = TokenSplit(trained.in_features, None, trained.out_features)
    split.init_weights()
    return split.equivariant


def _load_strictly(
    backbone: DinoVisionTransformer, weights: Mapping[str, Tensor], path: Path, *, is_ours: bool, is_described: bool
) -> int:
    """Loads weights whose names and shapes must all match, and returns the number of tensors.

    Weights of others may have another position table and lack the mask token.
    """
    expected, notes = backbone.state_dict(), []
    adaptable = () if is_ours else ADAPTABLE
    compared = [{key: each[key] for key in each.keys() - adaptable} for each in (expected, weights)]
    if is_described and (misfit := describe_misfit(*compared)):
        raise ValueError(
            f"The weights of {path} belong to another architecture than the config describes: {misfit}. "
            "Pass the --config-file it was trained with."
        )
    if not is_ours:
        try:
            weights, notes = adapt(weights, backbone)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    backbone.load_state_dict(weights)
    changed = f" ({'; '.join(notes)})" if notes else ""
    logger.info("loaded %d of %d tensors of the backbone from %s%s", len(expected), len(expected), path, changed)
    return len(expected)


def _load_foreign(source: str, kind: str, name: str) -> Encoder:
    foreign = LOADERS[kind](name, True)
    num_tensors = len(foreign.backbone.state_dict())
    encoder = _from_foreign(source, foreign, num_tensors)
    logger.info("loaded %d of %d tensors of the backbone from %s", num_tensors, num_tensors, source)
    return encoder


def _load_random(what: str) -> Encoder:
    source = f"random:{what}"
    kind, _, name = what.partition(":")
    if kind == "hub" or Path(what).exists():  # a release may have fewer blocks than its entry point builds
        encoder = random_encoder(load_encoder(what), SEED)
        return replace(encoder, description={**encoder.description, "source": source})
    if kind in LOADERS:
        foreign = _seeded(lambda: LOADERS[kind](name, False), SEED)
    elif found := RANDOM.fullmatch(what):
        patch_size = int(found["patch_size"])
        image_size = int(found["img_size"] or IMAGENET_SIZE)
        untrained = partial(build_backbone, found["arch"], patch_size=patch_size, img_size=image_size)
        foreign = Foreign(_seeded(untrained, SEED), untrained, image_size, IMAGENET_MEAN, IMAGENET_STD)
    else:
        raise ValueError(
            f"{source}: write random:ARCH/PATCH or random:ARCH/PATCH@SIZE, for example random:vit_small/16, "
            f"{', '.join(f'random:{kind}:NAME' for kind in LOADERS)}, or random:PATH of a run or weights"
        )
    encoder = _from_foreign(source, foreign, num_tensors=0)
    return replace(encoder, step=0, description={**encoder.description, "step": 0, "random_seed": SEED})


def _from_foreign(source: str, foreign: Foreign, num_tensors: int) -> Encoder:
    backbone = _frozen(foreign.backbone)
    require_tokens(source, backbone, foreign.image_size)
    return Encoder(
        backbone=backbone,
        image_size=foreign.image_size,
        mean=foreign.mean,
        std=foreign.std,
        config={},
        step=None,
        description=_describe(source, backbone, foreign.image_size, num_tensors) | {"checkpoint": None, "step": None},
        untrained=foreign.untrained,
    )


def _describe(source: str, backbone: nn.Module, image_size: int, num_tensors: int) -> dict[str, Any]:
    return {
        "source": source,
        "loaded_tensors": num_tensors,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "embed_dim": backbone.embed_dim,
        "patch_size": backbone.patch_size,
        "image_size": image_size,
    }


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _seeded(build: Callable[[], Any], seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def _choose_config(path: Path, own: dict[str, Any] | None, config_file: str | None) -> dict[str, Any]:
    given = to_dict(load_config(config_file)) if config_file else None
    if own is None or given is None:
        return given or own
    if contradictions := list(_contradictions(_encoder_settings(own), _encoder_settings(given))):
        raise ValueError(
            f"--config-file {config_file} contradicts the config that {path} carries: {'; '.join(contradictions)} "
            "(checkpoint first). Leave --config-file out: the checkpoint's own is used."
        )
    return own


def _encoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings of a training config that define the encoder."""
    try:
        if unknown := config["student"].keys() - StudentConfig.__dataclass_fields__.keys():
            raise ValueError(
                f"The checkpoint's config has student.{sorted(unknown)[0]}, which this version does not know; evaluate "
                "with the version that trained it"
            )
        student = backbone_arguments(config["student"])
        return {"student": student, **{key: config["crops"][key] for key in ("global_crops_size", "mean", "std")}}
    except KeyError as error:
        raise ValueError(
            f"The checkpoint's config lacks {error}; an encoder needs the sections student and crops, the latter with "
            "global_crops_size, mean and std"
        ) from None


def _contradictions(own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in own.items():
        if isinstance(value, Mapping):
            yield from _contradictions(value, given[key])
        elif value != given.get(key):
            yield f"{key} {value!r} and {given.get(key)!r}"
