"""Builds the objects of a run. Each gets its own section of the config or plain values, never the whole config."""

import copy
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.schema import Config
from dinov2_eq.data.augmentations import MultiCrop, make_views
from dinov2_eq.data.datasets import ImageDataset
from dinov2_eq.data.loaders import make_train_loader
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.distributed import get_rank, get_world_size, is_main_process
from dinov2_eq.equivariance.split import NoSplit, TokenSplit
from dinov2_eq.fsdp import Policy, load_full, parallelize
from dinov2_eq.models import BACKBONES
from dinov2_eq.models.backbone import Backbone
from dinov2_eq.objectives.base import Needs, Objective
from dinov2_eq.train.gradient_share import GradientShare
from dinov2_eq.train.param_groups import build_param_groups
from dinov2_eq.train.pretrained import Parts, start_state
from dinov2_eq.train.schedules import Schedules, scaled_lr
from dinov2_eq.train.ssl_meta_arch import Network, SSLMetaArch
from dinov2_eq.train.step import Run
from dinov2_eq.types import CollatedBatch, ViewBatch


def global_batch_size(config: Config, world_size: int | None = None) -> int:
    """Returns the number of images in one optimizer step; `world_size` defaults to the number of running processes."""
    processes = get_world_size() if world_size is None else world_size
    return config.train.batch_size_per_gpu * config.train.accumulation_steps * processes


def uses_half_precision(config: Config, device: torch.device) -> bool:
    """Returns whether networks run under bfloat16 autocast; weights, losses and optimizer stay float32."""
    precision = config.compute_precision.dtype
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def build_arch(config: Config, device: torch.device, read_weights: Callable[[], Parts] | None = None) -> SSLMetaArch:
    """Builds student, teacher and objectives, initialised from `train.seed` and sharded over all processes.

    On the meta device no memory is allocated and nothing is initialised, which is enough to count parameters.

    Args:
        read_weights: returns initial weights by module; only the main process calls it.

    Raises:
        ValueError: `fsdp.strategy` does not fit the number of processes, or the weights do not fit the backbone.
    """
    needs = config.needs()
    with torch.device("meta"):
        student = _build_network(config, needs, student=True)
        teacher = _build_network(config, needs, student=False) if needs.teacher else None
        dim = _invariant_dim(needs, student["backbone"])
        arch = SSLMetaArch(student, teacher, *_build_objectives(config, dim))
    if device.type == "meta":
        return arch
    parts = {**student, **{f"objectives.{name}": objective for name, objective in arch.objectives.items()}}
    whole = {name: copy.deepcopy(part) for name, part in parts.items()}
    policy = Policy(
        config.fsdp.strategy,
        config.fsdp.activation_checkpointing,
        config.fsdp.compile,
        uses_half_precision(config, device),
    )
    copies = dict(teacher or {})
    networks = [*student.values(), *copies.values()]
    parallelize([*networks, *(part for term in arch.objectives.values() for part in term.children())], policy, device)
    arch.to_empty(device=device)
    for parameter in arch.parameters():
        nn.init.constant_(parameter, torch.nan)
    for buffer in arch.buffers():
        buffer.zero_()
    found = read_weights() if read_weights and is_main_process() else None
    for name, part in parts.items():
        make_state = cache(partial(_initial_state, name, whole[name], f"{config.train.seed}.{name}", found))
        load_full(part, make_state)
        if name in copies:
            load_full(copies[name], make_state)
    return arch


def _build_network(config: Config, needs: Needs, *, student: bool) -> Network:
    settings = config.student if student else replace(config.student, drop_path_rate=0.0)
    backbone = BACKBONES[settings.arch].build(settings, config.crops.global_crops_size)
    projection = TokenSplit(backbone.embed_dim, *needs.split) if needs.split else NoSplit()
    sections, dim = config.objectives(), _invariant_dim(needs, backbone)
    heads = {name: sections[section].build_head(dim) for name, section in needs.heads.items()}
    return Network({"backbone": backbone, "projection": projection, **heads})


def _invariant_dim(needs: Needs, backbone: Backbone) -> int:
    """Returns the channels of a token that the base losses see."""
    dim = needs.split[0] if needs.split else None
    return backbone.embed_dim if dim is None else dim


def _build_objectives(
    config: Config, dim: int
) -> tuple[dict[str, Objective], dict[str, float], dict[str, GradientShare]]:
    """Builds each loss with a positive weight; returns them, their weights and their shares by name."""
    context = objective_context(config)
    objectives, weights, shares = {}, {}, {}
    for section in config.objectives().values():
        for name, weight in section.weights().items():
            if weight > 0:
                objectives[name], weights[name] = section.build(name, context, dim), weight
        shares |= {name: GradientShare(*ends) for name, ends in section.gradient_shares().items() if name in objectives}
    return objectives, weights, shares


def _initial_state(name: str, module: nn.Module, seed: str, found: Parts | None) -> dict[str, Tensor]:
    """Returns the initial state dict, on the CPU, of a module built on the meta device; weights in `found` come first.

    Each module has its own seed, so its weights do not depend on the other modules, the device or the number of
    processes. Weights that nothing initialises stay NaN and stop the run at its first step.
    """
    module.to_empty(device="cpu")
    for tensor in module.parameters():
        nn.init.constant_(tensor, torch.nan)
    for buffer in module.buffers():
        buffer.zero_()
    torch.manual_seed(zlib.crc32(seed.encode()))
    _initialise(module)
    return module.state_dict() if found is None else start_state(name, module, found)


def _initialise(module: nn.Module) -> None:
    """Calls `init_weights`, which also initialises submodules; else `reset_parameters`, and recurses into children."""
    if hasattr(module, "init_weights"):
        module.init_weights()
        return
    if hasattr(module, "reset_parameters"):
        module.reset_parameters()
    for child in module.children():
        _initialise(child)


def build_optimizer(config: Config, arch: SSLMetaArch) -> torch.optim.AdamW:
    optim = config.optim
    groups = build_param_groups(
        arch.trainable_modules(),
        layerwise_decay=optim.layerwise_decay,
        patch_embed_lr_mult=optim.patch_embed_lr_mult,
    )
    # Without fused=True, torch loops over sharded parameters one by one.
    return torch.optim.AdamW(groups, betas=(optim.adamw_beta1, optim.adamw_beta2), fused=True)


def build_schedules(config: Config) -> Schedules:
    lr = scaled_lr(config.optim.base_lr, config.optim.scaling_rule, global_batch_size(config))
    return Schedules(config.optim, config.teacher, lr)


def build_multi_crop(config: Config) -> MultiCrop:
    needs = config.needs()
    num_local = config.crops.local_crops_number if needs.local_crops else 0
    return MultiCrop(config.crops, config.pairing(), num_local)


def build_make_views(config: Config) -> Callable[[CollatedBatch], ViewBatch]:
    """Returns `make_views` with every argument bound except the batch."""
    needs = config.needs()
    return partial(
        make_views,
        crops=config.crops,
        pairing=config.pairing(),
        targets=needs.targets,
        path=needs.path,
    )


def build_train_loader(
    config: Config, dataset: ImageDataset, start_step: int, num_workers: int
) -> DataLoader[CollatedBatch]:
    """Returns an endless loader of training batches, from those of step `start_step` on."""
    needs = config.needs()
    masking = None
    if needs.masks:
        grid = objective_context(config).grid
        masking = BlockMasking(grid, needs.masks.ratio_min_max, needs.masks.sample_probability)
    return make_train_loader(
        dataset,
        build_multi_crop(config),
        masking,
        seed=config.train.seed,
        batch_size=config.train.batch_size_per_gpu,
        global_batch_size=global_batch_size(config),
        rank=get_rank(),
        world_size=get_world_size(),
        start_position=start_step * global_batch_size(config),
        num_workers=num_workers,
        path=needs.path,
        known_share=config.train.known_share,
    )


def make_run(config: Config, device: torch.device, read_weights: Callable[[], Parts] | None = None) -> Run:
    """Builds everything that `train_step` needs; the arguments are those of `build_arch`."""
    arch = build_arch(config, device, read_weights)
    return Run(
        arch=arch,
        optimizer=build_optimizer(config, arch),
        schedules=build_schedules(config),
        make_views=build_make_views(config),
        device=device,
        half_precision=uses_half_precision(config, device),
        accumulation_steps=config.train.accumulation_steps,
        clip_grad=config.optim.clip_grad,
        clip_grad_per=config.optim.clip_grad_per,
        seed=config.train.seed,
    )
