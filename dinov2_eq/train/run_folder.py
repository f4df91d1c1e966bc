"""Files in a run's output folder other than checkpoints and metrics."""

import json
import logging
from pathlib import Path

import torch
from torch import nn

from dinov2_eq.config.load import load_config, to_dict, to_yaml
from dinov2_eq.config.schema import Config
from dinov2_eq.distributed import is_main_process
from dinov2_eq.files import replace_text, whole_file
from dinov2_eq.fsdp import full_state
from dinov2_eq.logging import describe_run

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
PRODUCTS = (
    CONFIG,
    CHECKPOINTS,
    "environment.json",
    "training_metrics.jsonl",
    "events.out.*",
    "samples",
    "eval",
    "results_eval_*.json",
    "*checkpoint_linear_eval*.pth",
)
# Settings that a resumed run must keep: they decide the initial weights, the optimizer's groups and the samples.
FIXED = (
    "student.pretrained_weights",
    "train.seed",
    "optim.layerwise_decay",
    "optim.patch_embed_lr_mult",
    "optim.adamw_beta1",
    "optim.adamw_beta2",
)

logger = logging.getLogger(__name__)


def set_aside(folder: Path) -> None:
    """Moves the files of an earlier run in the folder to a subfolder `previous-<n>/`."""
    found = [path for pattern in PRODUCTS for path in folder.glob(pattern)]
    if not found:
        return
    numbers = [path.name.removeprefix("previous-") for path in folder.glob("previous-*")]
    previous = folder / f"previous-{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    previous.mkdir()
    for path in found:
        path.rename(previous / path.name)
    logger.info("the earlier run in %s was moved to %s", folder, previous)


def require_same_run(folder: Path, config: Config) -> None:
    """Compares the config with that of the run to resume, and logs what changed.

    Raises:
        ValueError: a setting in `FIXED` changed, or the run's config.yaml is damaged.
    """
    changes = changed_settings(folder / CONFIG, config)
    if refused := [text for key, text in changes.items() if key in FIXED]:
        raise ValueError(
            f"The run in {folder} cannot resume with changed settings: {'; '.join(refused)}. "
            "Give the old values, another --output-dir, or --no-resume"
        )
    for text in changes.values():
        logger.warning("resuming with a changed setting: %s", text)


def changed_settings(path: Path, config: Config) -> dict[str, str]:
    """Compares a config with the one in a file; returns a phrase for each setting that differs, {} without a file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        before, now = to_dict(load_config(str(path))), to_dict(config)
    except ValueError as error:
        raise ValueError(
            f"{error}\nA resumed run is compared with this file: restore it, or delete it to skip the comparison"
        ) from None
    return {
        f"{section}.{key}": f"{section}.{key} was {before[section][key]!r}, now {value!r}"
        for section, values in now.items()
        for key, value in values.items()
        if before[section][key] != value
    }


def describe(folder: Path, config: Config, device: torch.device) -> None:
    """Writes the resolved config to config.yaml, and code and machine to environment.json."""
    if is_main_process():
        replace_text(folder / CONFIG, to_yaml(config))
        replace_text(folder / "environment.json", json.dumps(describe_run(device), indent=2) + "\n")


def write_teacher(folder: Path, teacher: nn.Module, config: Config, step: int) -> None:
    """Writes `eval/training_<step>/teacher_checkpoint.pth`, which carries its config; all processes must call it."""
    weights = full_state(teacher)
    if not is_main_process():
        return
    path = folder / "eval" / f"training_{step}" / "teacher_checkpoint.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    # An open file, not a path: given a path, torch does not say why it cannot write.
    with whole_file(path) as temporary, temporary.open("wb") as file:
        torch.save({"teacher": weights, "config": to_dict(config), "step": step}, file)
    logger.info("wrote %s", path)
