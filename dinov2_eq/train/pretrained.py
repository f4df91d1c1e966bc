"""Loads `student.pretrained_weights`, which replace random initial weights."""

import logging
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from dinov2_eq.checkpointer import Checkpointer, read_model
from dinov2_eq.distributed import is_distributed
from dinov2_eq.models.backbone import Backbone
from dinov2_eq.models.convert import HEADS, describe_misfit, to_dinov2
from dinov2_eq.models.foreign_backbones import LOADERS
from dinov2_eq.models.weight_files import instead_of_folder, read_checkpoint
from dinov2_eq.train.run_folder import CHECKPOINTS

logger = logging.getLogger(__name__)

Parts = Mapping[str, Mapping[str, Tensor]]  # state dicts by module: "backbone", "projection", "dino_head", ...
LIBRARIES = ("timm", "hf")


def find_pretrained(source: str) -> str | Path:
    """Resolves a run folder to its newest complete checkpoint; returns any other `source`, such as "", unchanged.

    All processes must call it.

    Raises:
        ValueError: the folder has no complete training checkpoint, or the checkpoint is damaged.
    """
    path = Path(source)
    if not source or not path.is_dir():
        return source
    if path.parent.name == CHECKPOINTS:
        with closing(Checkpointer(path.parent, keep=1)) as checkpointer:
            damage = checkpointer.damage(path.name)
        if damage:
            raise ValueError(
                f"student.pretrained_weights={source} is damaged ({damage}); give another step, or the run folder"
            )
        return source
    with closing(Checkpointer(path / CHECKPOINTS, keep=1)) as checkpointer:
        step = checkpointer.newest_whole()
    if step is None:
        raise ValueError(
            f"student.pretrained_weights={source} holds no training checkpoint; give a run folder, one of its "
            f"{CHECKPOINTS}/<step>, or a file of weights{instead_of_folder(path)}"
        )
    return path / CHECKPOINTS / str(step)


def read_pretrained(source: str | Path) -> Parts:
    """Reads weights to the CPU, by module, the backbone's under DINOv2's names; needs no other process.

    Args:
        source: a folder `checkpoints/<step>` of a run (all but its teacher); a teacher checkpoint; a file
            of backbone weights in the naming of DINOv2, DINO, iBOT, timm or Hugging Face; `timm:NAME`; or `hf:NAME`,
            where NAME may be a folder.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: the source holds no backbone in a known naming or is damaged, or its library is not installed or
            cannot provide the whole model.
    """
    kind, _, name = str(source).partition(":")
    if kind in LIBRARIES and name:
        return {"backbone": to_dinov2(_from_library(kind, name))}
    path = Path(source)
    if path.is_dir():
        model = read_model(path)
        return _split({name.removeprefix("student."): tensor for name, tensor in model.items()}, without=("teacher",))
    weights, config, _ = read_checkpoint(path)
    teacher = weights.get("teacher", weights)
    if config is not None and any(name.startswith("backbone.") for name in teacher):
        return _split(teacher)  # ours: a teacher checkpoint (projection and heads), or a release (projection)
    return {"backbone": to_dinov2(weights)}


def load_optimizer(source: str | Path, arch: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Loads the moments of the training checkpoint `source`, if it is one and has them for every parameter."""
    if not Path(source).is_dir():
        return
    state = get_optimizer_state_dict(arch, optimizer)
    try:
        dcp.load({"optimizer": {"state": state["state"]}}, checkpoint_id=source, no_dist=not is_distributed())
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        logger.info("the optimizer starts from scratch: %s does not have the same parameters (%s)", source, reason)
        return
    set_optimizer_state_dict(arch, optimizer, state)
    logger.info("the optimizer continues with the moments of %s", source)


def start_state(name: str, module: nn.Module, found: Parts) -> dict[str, Tensor]:
    """Returns the state dict that a freshly initialised module starts with: the weights in `found`, else its own.

    Raises:
        ValueError: the weights do not fit the backbone; the message counts tensors and names some.
    """
    own, given = module.state_dict(), found.get(name)
    if not own:
        return own
    if isinstance(module, Backbone):
        try:
            fitted, notes = module.start_from(found["backbone"])
        except ValueError as error:
            raise ValueError(
                f"student.pretrained_weights do not fit: {error}. Set student.arch, depth, layerscale, ... to "
                "match them"
            ) from None
        logger.info(
            "backbone: loaded %d of %d tensors%s", len(fitted), len(own), "".join(f"; {note}" for note in notes)
        )
        return {key: tensor.to(own[key].dtype) for key, tensor in fitted.items()}  # releases are in float16
    misfit = describe_misfit(own, given) if given else "not in student.pretrained_weights"
    if misfit:
        logger.info("%s starts from scratch: %s", name, misfit)
        return own
    logger.info("%s: loaded %d of %d tensors", name, len(given), len(own))
    return {key: tensor.to(own[key].dtype) for key, tensor in given.items()}


def _split(weights: Mapping[str, Tensor], without: tuple[str, ...] = ()) -> Parts:
    """Groups weights by module, "backbone" or "objectives.<name>"; raises ValueError if there is no backbone."""
    parts: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in weights.items():
        first, _, rest = full_name.partition(".")
        if first == "objectives":
            second, _, rest = rest.partition(".")
            first = f"{first}.{second}"
        if first not in without:
            parts.setdefault(first, {})[rest] = tensor
    if "backbone" not in parts:
        raise ValueError(f"student.pretrained_weights holds no backbone, only {', '.join(sorted(parts))}")
    return parts


def _from_library(kind: str, name: str) -> dict[str, Tensor]:
    foreign = LOADERS[kind](name, True).backbone
    own = HEADS.get(foreign.embed_dim)  # None: no backbone of this project has this width
    for module in foreign.modules():  # timm; transformers
        heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
        if own and heads not in (None, own):
            raise ValueError(
                f"student.pretrained_weights={kind}:{name} has {heads} attention heads for {foreign.embed_dim} "
                f"channels; backbones of this project have {own}, so their outputs would differ"
            )
    return foreign.model.state_dict()
