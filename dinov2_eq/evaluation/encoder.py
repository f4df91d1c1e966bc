"""The backbone of a teacher checkpoint, with the config it was trained with."""

import logging
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dinov2_eq.config.load import load_config, to_dict
from dinov2_eq.config.schema import StudentConfig
from dinov2_eq.models import build_backbone

CHECKPOINTS = "eval/training_*/teacher_checkpoint.pth"
NUM_SHOWN = 3  # names in a message
PREFIX = "backbone."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Encoder:
    backbone: nn.Module  # a DinoVisionTransformer in eval mode, on the CPU
    image_size: int  # side, in pixels, of the images it was trained with
    mean: list[float]  # pixel statistics, in [0, 1]
    std: list[float]
    config: dict[str, Any]  # the whole training config
    step: int | None  # optimizer updates behind it; None where the checkpoint does not say
    description: dict[str, Any]  # for results files: where it comes from and what it is


def load_encoder(path: str | Path, config_file: str | None = None) -> Encoder:
    """Reads a run folder (its newest `eval/training_<step>/teacher_checkpoint.pth`) or a teacher checkpoint.

    Args:
        config_file: config for a checkpoint that carries none; a checkpoint's own must agree with it.

    Raises:
        FileNotFoundError: no such path, or a folder without a teacher checkpoint.
        ValueError: not a teacher checkpoint, no config or a contradicting one, or weights of another architecture.
    """
    checkpoint_path = find_checkpoint(Path(path))
    checkpoint = _read(checkpoint_path)
    config = _choose_config(checkpoint_path, checkpoint, config_file)
    settings = _encoder_settings(config)
    backbone = build_backbone(**settings["student"], img_size=settings["global_crops_size"])
    num_tensors = _load_strictly(backbone, checkpoint["teacher"], checkpoint_path)
    step = checkpoint.get("step")
    return Encoder(
        backbone=backbone.eval().requires_grad_(False),
        image_size=settings["global_crops_size"],
        mean=settings["mean"],
        std=settings["std"],
        config=config,
        step=step,
        description={
            "checkpoint": str(checkpoint_path.resolve()),
            "step": step,
            "loaded_tensors": num_tensors,
            "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
            "embed_dim": backbone.embed_dim,
            "image_size": settings["global_crops_size"],
            "student": config["student"],
            "equivariance": config.get("equivariance"),
        },
    )


def random_encoder(encoder: Encoder, seed: int) -> Encoder:
    """The same architecture before any training; torch's global generator is left as it was."""
    settings = _encoder_settings(encoder.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = build_backbone(**settings["student"], img_size=encoder.image_size)
    return replace(
        encoder,
        backbone=backbone.eval().requires_grad_(False),
        step=0,
        description={**encoder.description, "checkpoint": None, "step": 0, "loaded_tensors": 0, "random_seed": seed},
    )


def find_checkpoint(path: Path) -> Path:
    """The file itself, or the newest teacher checkpoint of a run folder."""
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
        "training writes every evaluation.eval_period_steps steps and at its end"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"{path} is not a teacher checkpoint, or it was cut off while it was written or copied ({reason})"
        ) from None
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("teacher"), Mapping):
        keys = (
            f"its keys are {sorted(map(str, checkpoint))[:5]}" if isinstance(checkpoint, Mapping) else "it is no dict"
        )
        raise ValueError(
            f"{path} is not a teacher checkpoint: it has no weights under the key 'teacher' ({keys}). Give a "
            "teacher_checkpoint.pth, which training writes below eval/training_<step>/"
        )
    return checkpoint


def _choose_config(path: Path, checkpoint: dict[str, Any], config_file: str | None) -> dict[str, Any]:
    own = checkpoint.get("config")
    given = to_dict(load_config(config_file)) if config_file else None
    if own is None and given is None:
        raise ValueError(
            f"{path} carries no config, so its architecture is unknown; pass --config-file with the YAML it was "
            "trained with (the sections student and crops are enough)"
        )
    if own is None or given is None:
        return given or own
    if differences := list(_differences(_encoder_settings(own), _encoder_settings(given))):
        raise ValueError(
            f"--config-file {config_file} contradicts the config that {path} carries: {'; '.join(differences)} "
            "(checkpoint first). Leave --config-file out: the checkpoint's own is used."
        )
    return own


def _encoder_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a training config makes the encoder; drop path and attention backend do not, so they are defaults."""
    try:
        student = {key: value for key, value in config["student"].items() if key not in ("drop_path_rate", "attention")}
        if unknown := student.keys() - StudentConfig.__dataclass_fields__.keys():
            raise ValueError(
                f"The checkpoint's config has student.{sorted(unknown)[0]}, which this version does not know; evaluate "
                "with the version that trained it"
            )
        return {"student": student, **{key: config["crops"][key] for key in ("global_crops_size", "mean", "std")}}
    except KeyError as error:
        raise ValueError(
            f"The checkpoint's config lacks {error}; an encoder needs the sections student and crops, the latter with "
            "global_crops_size, mean and std"
        ) from None


def _differences(own: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[str]:
    for key, value in own.items():
        if isinstance(value, Mapping):
            yield from _differences(value, given[key])
        elif value != given.get(key):
            yield f"{key} {value!r} and {given.get(key)!r}"


def _load_strictly(backbone: nn.Module, teacher: Mapping[str, Tensor], path: Path) -> int:
    """Copies `backbone.*` into the backbone; all names and shapes must agree. Returns the number of tensors."""
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in teacher.items() if name.startswith(PREFIX)}
    expected = backbone.state_dict()
    shared = expected.keys() & weights.keys()
    misshaped = {name for name in shared if weights[name].shape != expected[name].shape}
    loaded = f"loaded {len(shared) - len(misshaped)} of {len(expected)} tensors"
    problems = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "of another shape": misshaped,
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in problems.items() if names)
        raise ValueError(
            f"The weights of {path} belong to another architecture than its config describes: {loaded}; {listed}. "
            "Pass the --config-file it was trained with."
        )
    backbone.load_state_dict(weights)
    logger.info("%s of the backbone from %s", loaded, path)
    return len(expected)


def _first(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:NUM_SHOWN]) + (", ..." if len(shown) > NUM_SHOWN else "")
