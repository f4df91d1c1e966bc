"""Estimates batch, length, parameters and memory of a run: `dinov2-eq train --dry-run`.

Memory is computed from the modules and from what autograd keeps for each operation. tests/train/test_estimate.py
compares it with measurements on a CPU.
"""

from collections.abc import Mapping

import torch
from torch import nn

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.schema import Config
from dinov2_eq.fsdp import STRATEGIES
from dinov2_eq.models import BACKBONES
from dinov2_eq.models.backbone import FLOAT_BYTES
from dinov2_eq.models.vision_transformer import kept_per_token
from dinov2_eq.train.build import global_batch_size
from dinov2_eq.train.schedules import scaled_lr
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch

GIB = 1024**3
HALF_BYTES = 2
# Values that autograd keeps in a decoder beyond its inputs and its blocks, per unit of its width.
CONV_KEPT_PER_PIXEL = 0.55
ATTENTION_KEPT_PER_PATCH = {"cross_attention": 9, "self_attention": 3}


def count_parameters(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}


def estimate_memory(
    config: Config, arch: SSLMetaArch, half_precision: bool, world_size: int = 1, nodes: int = 1
) -> dict[str, float]:
    """Estimates the memory of each of `world_size` processes on `nodes` nodes, in GiB, at the end of the forward pass.

    The parts are "weights and optimizer" (exact), "gathered weights" (copies for sharded or bfloat16 computation),
    "backbone", "heads" and "decoders" (what autograd keeps, within 15 %), "logits" (temporary, before they become
    probabilities), and "total". What autograd keeps for other losses than DINO, iBOT and the task is not counted.
    The driver's context, NCCL and allocator fragmentation come on top: leave 10 % free.
    """
    compute_bytes = HALF_BYTES if half_precision else FLOAT_BYTES
    parts = {
        **_weights(config, arch, compute_bytes, world_size, nodes),
        "backbone": _backbone(config, compute_bytes),
        **_heads(config, arch, compute_bytes),
        "decoders": _decoders(config, arch, compute_bytes),
    }
    return {name: size / GIB for name, size in parts.items()} | {"total": sum(parts.values()) / GIB}


def _weights(config: Config, arch: SSLMetaArch, compute_bytes: int, world_size: int, nodes: int) -> dict[str, float]:
    trainable = sum(count_parameters(arch.trainable_modules()).values())
    teacher = sum(parameter.numel() for parameter in arch.teacher.parameters()) if arch.teacher else 0
    stored = FLOAT_BYTES * (trainable * 4 + teacher)  # weights, gradients, two moments of AdamW; the teacher's weights
    if world_size == 1 or config.fsdp.strategy == "none":  # nothing is gathered, but autocast caches converted weights
        converted = compute_bytes * trainable if compute_bytes < FLOAT_BYTES else 0
        return {"weights and optimizer": stored, "gathered weights": converted}
    strategy = STRATEGIES[config.fsdp.strategy]
    _, shards = strategy.mesh_shape(world_size, world_size // nodes)
    # Two units are gathered at any time, one in use and one in transit; their gradients are summed in float32.
    under_way = 2 * largest_unit(arch)
    gathered = under_way if strategy.reshard else trainable
    return {
        "weights and optimizer": stored / shards,
        "gathered weights": compute_bytes * gathered + FLOAT_BYTES * under_way,
    }


def largest_unit(arch: SSLMetaArch) -> int:
    """Returns the number of parameters in the largest stage, head or decoder, the unit that FSDP gathers at once."""
    stages = [stage for module in arch.modules() if hasattr(module, "stages") for stage in module.stages()]
    heads = [module for name, module in arch.student.items() if name not in ("backbone", "projection")]
    own = [part for term in arch.objectives.values() for part in term.modules() if part is not term]
    units = [*stages, *heads, *(part for part in own if not isinstance(part, nn.ModuleList))]
    return max(sum(parameter.numel() for parameter in unit.parameters()) for unit in units)


def views_by_size(config: Config) -> dict[int, float]:
    """Returns how many views of each image the student encodes on average, by their side in pixels."""
    crops, needs = config.crops, config.needs()
    views = {crops.global_crops_size: 2.0}
    if needs.local_crops:
        views[crops.local_crops_size] = views.get(crops.local_crops_size, 0) + crops.local_crops_number
    if needs.path:
        size = crops.local_crops_size if needs.path.local_size else crops.global_crops_size
        views[size] = views.get(size, 0) + needs.path.share * len(needs.path.fractions)
    return views


def _backbone(config: Config, compute_bytes: int) -> float:
    crops = config.crops
    with torch.device("meta"):
        backbone = BACKBONES[config.student.arch].build(config.student, crops.global_crops_size)
    total = 0.0
    for size, number in views_by_size(config).items():
        stages = backbone.kept_of_image(size, compute_bytes) if number else []
        kept = sum(stage.inside for stage in stages)
        if config.fsdp.activation_checkpointing and stages:  # the inputs of all, and everything in one
            kept = sum(stage.input for stage in stages) + max(stage.inside for stage in stages)
        total += number * kept
    return config.train.batch_size_per_gpu * total


def _heads(config: Config, arch: SSLMetaArch, compute_bytes: int) -> dict[str, float]:
    """Counts the bytes of student and teacher probabilities (float32), of the MLP and of the prototype weights."""
    batch = config.train.batch_size_per_gpu
    rows, columns = objective_context(config).grid
    masked = config.ibot.mask_sample_probability * sum(config.ibot.mask_ratio_min_max) / 2 * 2 * batch * rows * columns
    rows_of = {"dino": (batch * (2 + config.crops.local_crops_number), 2 * batch), "ibot": (masked, masked)}
    kept, passing = 0.0, 0.0
    for name, (student_rows, teacher_rows) in rows_of.items():
        if name not in arch.objectives:
            continue
        head = arch.student["ibot_head" if name == "ibot" and "ibot_head" in arch.student else "dino_head"]
        prototypes, bottleneck = head.last_layer.weight_v.shape
        linears = [layer for layer in head.mlp.modules() if isinstance(layer, nn.Linear)]
        widths = sum(layer.in_features + layer.out_features for layer in linears)
        kept += FLOAT_BYTES * prototypes * (student_rows + teacher_rows)
        kept += compute_bytes * widths * student_rows + (FLOAT_BYTES + compute_bytes) * prototypes * bottleneck
        # Before the log-softmax: raw logits, a float32 copy, and that copy divided by the temperature.
        passing = max(passing, (compute_bytes + 2 * FLOAT_BYTES) * prototypes * student_rows)
    return {"heads": kept, "logits": passing}


def _decoders(config: Config, arch: SSLMetaArch, compute_bytes: int) -> float:
    task, path, crops = config.equivariance, config.needs().path, config.crops
    if "reconstruction" not in arch.objectives:
        return 0.0
    images = config.train.batch_size_per_gpu * (path.share if path else 1.0)
    side = crops.local_crops_size if path and path.local_size else crops.global_crops_size
    patch_size = objective_context(config).patch_size
    patches = (side // patch_size) ** 2
    values = 2 * task.equivariant_dim  # the tokens of both views
    if task.decoder == "conv":
        values += CONV_KEPT_PER_PIXEL * task.decoder_dim * patch_size**2
        kept = compute_bytes * values
    else:
        values += ATTENTION_KEPT_PER_PATCH[task.decoder] * task.decoder_dim
        blocks = arch.objectives["reconstruction"].decoders[0].blocks
        kept = compute_bytes * values + sum(kept_per_token(block, compute_bytes) for block in blocks)
    kept += 2 * FLOAT_BYTES * 3 * patch_size**2  # the loss keeps image and target
    return task.num_intermediates * images * patches * kept


def plan(
    config: Config,
    arch: SSLMetaArch,
    num_images: int | None,
    half_precision: bool,
    world_size: int = 1,
    nodes: int = 1,
) -> str:
    """Describes batch, learning rate, length, parameters and memory of a run, as text for the log or terminal.

    Args:
        num_images: number of training images; None: unknown, so the number of passes is left out.
    """
    batch = global_batch_size(config, world_size)
    images = batch * config.optim.steps
    lr = scaled_lr(config.optim.base_lr, config.optim.scaling_rule, batch)
    parameters = count_parameters(arch.trainable_modules())
    memory = estimate_memory(config, arch, half_precision, world_size, nodes)
    per_process, accumulated = config.train.batch_size_per_gpu, config.train.accumulation_steps
    passes = "" if num_images is None else f", {images / num_images:.2f} passes over {num_images:,} images"
    strategy = f", fsdp.strategy={config.fsdp.strategy} on {nodes} nodes" if world_size > 1 else ""
    lines = [
        f"effective batch    {batch} images: {per_process} a forward, {accumulated} forwards, {world_size} processes"
        + strategy,
        f"learning rate      {lr:.3g} (base_lr {config.optim.base_lr:g}, {config.optim.scaling_rule})",
        f"steps              {config.optim.steps}, {config.optim.warmup_steps} of them warm-up",
        f"images seen        {images:,}{passes}",
        f"parameters         {sum(parameters.values()):,} trained: "
        + ", ".join(f"{name} {count:,}" for name, count in parameters.items()),
        f"memory estimate    {size_text(memory['total'])} per process: "
        + ", ".join(f"{name} {size_text(size)}" for name, size in memory.items() if name != "total"),
    ]
    return "\n".join(lines)


def size_text(gib: float) -> str:
    """Formats a size in GiB as "1.5 GiB", or as "300 MiB" below 1 GiB."""
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
