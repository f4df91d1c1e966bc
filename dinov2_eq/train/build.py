"""Config -> objects. The only place that knows both; every object gets plain values."""

import copy
import zlib
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dinov2_eq.config.schema import Config, EquivarianceConfig
from dinov2_eq.data.augmentations import MultiCrop, make_views
from dinov2_eq.data.datasets import ImageDataset
from dinov2_eq.data.loaders import make_train_loader
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.distributed import get_rank, get_world_size, is_main_process
from dinov2_eq.equivariance.decoders import build_decoder
from dinov2_eq.equivariance.split import NoSplit, TokenSplit
from dinov2_eq.equivariance.transforms import Transform, build_transform
from dinov2_eq.fsdp import Policy, load_full, parallelize
from dinov2_eq.layers.dino_head import DINOHead
from dinov2_eq.models import build_backbone
from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.train.objectives.dino import DinoObjective
from dinov2_eq.train.objectives.ibot import IbotObjective
from dinov2_eq.train.objectives.koleo import KoLeoObjective
from dinov2_eq.train.objectives.reconstruction import ReconstructionObjective
from dinov2_eq.train.objectives.targets import build_targets
from dinov2_eq.train.param_groups import build_param_groups
from dinov2_eq.train.pretrained import Parts, start_state
from dinov2_eq.train.schedules import Schedules, scaled_lr
from dinov2_eq.train.ssl_meta_arch import Network, SSLMetaArch
from dinov2_eq.types import CollatedBatch, ViewBatch


def global_batch_size(config: Config, world_size: int | None = None) -> int:
    """Images in one optimizer step of `world_size` processes, or of as many as there are."""
    processes = get_world_size() if world_size is None else world_size
    return config.train.batch_size_per_gpu * config.train.accumulation_steps * processes


def patch_grid(config: Config) -> tuple[int, int]:
    """Patches (h, w) of a global crop."""
    side = config.crops.global_crops_size // config.student.patch_size
    return side, side


def build_task_transform(task: EquivarianceConfig) -> Transform | None:
    """The transform g, or None where the task is disabled."""
    if not task.enabled:
        return None
    return build_transform(
        task.transform,
        max_angle_deg=task.max_angle_deg,
        max_shift=task.max_shift,
        max_color=task.max_color,
        max_hue=task.max_hue,
        blur_sigma_min_max=task.blur_sigma_min_max,
    )


def num_reconstructed(task: EquivarianceConfig) -> int:
    """K, or 0 for the plain method and for the control."""
    return task.num_intermediates if task.enabled and task.loss_weight > 0 else 0


def uses_half_precision(config: Config, device: torch.device) -> bool:
    """Whether networks run under bfloat16 autocast; weights, losses and optimizer stay float32."""
    precision = config.compute_precision.dtype
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")


def build_arch(config: Config, device: torch.device, read_weights: Callable[[], Parts] | None = None) -> SSLMetaArch:
    """Student, teacher and objectives on `device`, with the weights of `train.seed`, spread over all processes.

    On the meta device it is only the description of all that, for counting.

    Args:
        read_weights: gives weights to start from, by module; the main process calls it.

    Raises:
        ValueError: a strategy that does not fit the number of processes.
    """
    loss_weights = {
        "dino": config.dino.loss_weight,
        "koleo": config.dino.koleo_loss_weight,
        "ibot": config.ibot.loss_weight,
        "reconstruction": config.equivariance.loss_weight,
    }
    with torch.device("meta"):
        student, teacher = _build_network(config, student=True), _build_network(config, student=False)
        arch = SSLMetaArch(student, teacher, _build_objectives(config), loss_weights)
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
    networks = [*student.values(), *teacher.values()]
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
        if name in teacher:
            load_full(teacher[name], make_state)
    return arch


def _build_network(config: Config, *, student: bool) -> Network:
    settings, task = config.student, config.equivariance
    backbone = build_backbone(
        settings.arch,
        patch_size=settings.patch_size,
        img_size=config.crops.global_crops_size,
        depth=settings.depth,
        drop_path_rate=settings.drop_path_rate if student else 0.0,
        drop_path_uniform=settings.drop_path_uniform,
        layerscale=settings.layerscale,
        ffn_layer=settings.ffn_layer,
        qkv_bias=settings.qkv_bias,
        proj_bias=settings.proj_bias,
        ffn_bias=settings.ffn_bias,
        num_register_tokens=settings.num_register_tokens,
        interpolate_antialias=settings.interpolate_antialias,
        interpolate_offset=settings.interpolate_offset,
        attention=settings.attention,
    )
    if task.enabled:
        projection = TokenSplit(backbone.embed_dim, task.patch_dim, task.equivariant_dim)
        invariant_dim = task.patch_dim - task.equivariant_dim
    else:
        projection, invariant_dim = NoSplit(), backbone.embed_dim
    network = Network({"backbone": backbone, "projection": projection})
    separate = config.ibot.loss_weight > 0 and config.ibot.separate_head
    if config.dino.loss_weight > 0 or not separate:
        network["dino_head"] = _build_head(config.dino, invariant_dim)
    if separate:
        network["ibot_head"] = _build_head(config.ibot, invariant_dim)
    return network


def _build_head(settings, in_dim: int) -> DINOHead:
    return DINOHead(
        in_dim,
        settings.head_n_prototypes,
        nlayers=settings.head_nlayers,
        hidden_dim=settings.head_hidden_dim,
        bottleneck_dim=settings.head_bottleneck_dim,
    )


def _build_objectives(config: Config) -> dict[str, Objective]:
    """One entry for each term with a positive weight."""
    objectives: dict[str, Objective] = {}
    task = config.equivariance
    if config.dino.loss_weight > 0:
        objectives["dino"] = DinoObjective(build_targets(config.train.centering, config.dino.head_n_prototypes))
    if config.dino.koleo_loss_weight > 0:
        objectives["koleo"] = KoLeoObjective()
    if config.ibot.loss_weight > 0:
        head, settings = ("ibot_head", config.ibot) if config.ibot.separate_head else ("dino_head", config.dino)
        objectives["ibot"] = IbotObjective(build_targets(config.train.centering, settings.head_n_prototypes), head)
    if num_reconstructed(task):
        decoders = [
            build_decoder(
                task.decoder,
                equivariant_dim=task.equivariant_dim,
                patch_size=config.student.patch_size,
                dim=task.decoder_dim,
                depth=task.decoder_depth,
                attention=config.student.attention,
            )
            for _ in range(task.num_intermediates)
        ]
        objectives["reconstruction"] = ReconstructionObjective(decoders, config.student.patch_size)
    return objectives


def _initial_state(name: str, module: nn.Module, seed: str, found: Parts | None) -> dict[str, Tensor]:
    """Initial weights of a module built on the meta device, on the CPU; those that were `found` go first.

    Every module draws from a seed of its own, so that it starts the same whatever else the run has and wherever it
    runs. Weights that no `init_weights` sets stay NaN and stop the run at its first step.
    """
    module.to_empty(device="cpu")
    for tensor in module.parameters():
        nn.init.constant_(tensor, torch.nan)
    for buffer in module.buffers():
        buffer.zero_()
    torch.manual_seed(zlib.crc32(seed.encode()))
    for part in [module] if hasattr(module, "init_weights") else module.modules():
        if hasattr(part, "init_weights"):
            part.init_weights()
    return module.state_dict() if found is None else start_state(name, module, found)


def build_optimizer(config: Config, arch: SSLMetaArch) -> torch.optim.AdamW:
    groups = build_param_groups(
        arch.trainable_modules(),
        depth=arch.student["backbone"].n_blocks,
        layerwise_decay=config.optim.layerwise_decay,
        patch_embed_lr_mult=config.optim.patch_embed_lr_mult,
    )
    # Told to fuse, as torch would go through sharded parameters one by one.
    return torch.optim.AdamW(groups, betas=(config.optim.adamw_beta1, config.optim.adamw_beta2), fused=True)


def build_schedules(config: Config) -> Schedules:
    optim, teacher = config.optim, config.teacher
    return Schedules(
        steps=optim.steps,
        lr=scaled_lr(optim.base_lr, optim.scaling_rule, global_batch_size(config)),
        min_lr=optim.min_lr,
        warmup_steps=optim.warmup_steps,
        freeze_last_layer_steps=optim.freeze_last_layer_steps,
        freeze_backbone_steps=optim.freeze_backbone_steps,
        weight_decay=optim.weight_decay,
        weight_decay_end=optim.weight_decay_end,
        momentum_teacher=teacher.momentum_teacher,
        final_momentum_teacher=teacher.final_momentum_teacher,
        warmup_teacher_temp=teacher.warmup_teacher_temp,
        teacher_temp=teacher.teacher_temp,
        warmup_teacher_temp_steps=teacher.warmup_teacher_temp_steps,
    )


def build_multi_crop(config: Config) -> MultiCrop:
    crops = config.crops
    return MultiCrop(
        global_crops_size=crops.global_crops_size,
        global_crops_scale=crops.global_crops_scale,
        local_crops_size=crops.local_crops_size,
        local_crops_scale=crops.local_crops_scale,
        local_crops_number=crops.local_crops_number,
        horizontal_flip=crops.horizontal_flip,
        jitter_prob=crops.jitter_prob,
        jitter=crops.jitter,
        grey_prob=crops.grey_prob,
        blur_prob=crops.blur_prob,
        solarize_prob=crops.solarize_prob,
        transform=build_task_transform(config.equivariance),
        border=config.equivariance.border,
    )


def build_make_views(config: Config, num_intermediates: int) -> Callable[[CollatedBatch], ViewBatch]:
    """`make_views` with everything but the batch filled in; `num_intermediates` targets are made."""
    return partial(
        make_views,
        transform=build_task_transform(config.equivariance),
        num_intermediates=num_intermediates,
        size=(config.crops.global_crops_size,) * 2,
        mean=config.crops.mean,
        std=config.crops.std,
    )


def build_train_loader(
    config: Config, dataset: ImageDataset, start_step: int, num_workers: int
) -> DataLoader[CollatedBatch]:
    """Batches from update number `start_step` on, without end."""
    masking = BlockMasking(
        patch_grid(config),
        ratio_min_max=config.ibot.mask_ratio_min_max,
        sample_probability=config.ibot.mask_sample_probability if config.ibot.loss_weight > 0 else 0.0,
    )
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
    )
