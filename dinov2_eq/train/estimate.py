"""What a run will take, before it starts: `dinov2-eq train --dry-run`."""

from collections.abc import Mapping

from torch import nn

from dinov2_eq.config.schema import Config
from dinov2_eq.train.build import global_batch_size, num_reconstructed
from dinov2_eq.train.schedules import scaled_lr
from dinov2_eq.train.ssl_meta_arch import SSLMetaArch

FLOAT_BYTES = 4
# Activations that autograd keeps for one token in one block, in units of the embedding size: two norms and their
# inputs, q, k, v, the attention's output, and the MLP's hidden layer before and after its activation.
KEPT_PER_TOKEN_AND_BLOCK = 17


def count_parameters(modules: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: sum(parameter.numel() for parameter in module.parameters()) for name, module in modules.items()}


def estimate_memory(config: Config, arch: SSLMetaArch, half_precision: bool) -> dict[str, float]:
    """Memory of one process in GiB: exact for weights and optimizer, about +-30 % for activations."""
    trainable = sum(count_parameters(arch.trainable_modules()).values())
    teacher = sum(parameter.numel() for parameter in arch.teacher.parameters())
    state = FLOAT_BYTES * (trainable * 4 + teacher)  # weights, gradients, two moments of AdamW; the teacher's weights

    crops, student, batch = config.crops, config.student, config.train.batch_size_per_gpu
    backbone = arch.student["backbone"]
    extra = 1 + student.num_register_tokens
    patches = (crops.global_crops_size // student.patch_size) ** 2
    tokens = 2 * (patches + extra)
    tokens += crops.local_crops_number * ((crops.local_crops_size // student.patch_size) ** 2 + extra)
    activation_bytes = 2 if half_precision else FLOAT_BYTES
    activations = batch * tokens * backbone.n_blocks * KEPT_PER_TOKEN_AND_BLOCK * backbone.embed_dim * activation_bytes

    masked = config.ibot.mask_sample_probability * sum(config.ibot.mask_ratio_min_max) / 2 * 2 * batch * patches
    rows = batch * (2 + crops.local_crops_number) * bool(config.dino.loss_weight) + masked * bool(
        config.ibot.loss_weight
    )
    heads = rows * config.dino.head_n_prototypes * (activation_bytes + 2 * FLOAT_BYTES)

    pixels = num_reconstructed(config.equivariance) * batch * crops.global_crops_size**2
    decoders = pixels * config.equivariance.decoder_dim / 8 * 2 * activation_bytes  # the widest maps are the last ones

    gib = 1024**3
    parts = {"weights and optimizer": state, "backbone": activations, "heads": heads, "decoders": decoders}
    return {name: size / gib for name, size in parts.items()} | {"total": sum(parts.values()) / gib}


def plan(config: Config, arch: SSLMetaArch, num_images: int, half_precision: bool) -> str:
    """Text for a person: batch, learning rate, length, parameters, memory."""
    batch = global_batch_size(config)
    images = batch * config.optim.steps
    lr = scaled_lr(config.optim.base_lr, config.optim.scaling_rule, batch)
    parameters = count_parameters(arch.trainable_modules())
    memory = estimate_memory(config, arch, half_precision)
    per_process, accumulated = config.train.batch_size_per_gpu, config.train.accumulation_steps
    processes = batch // (per_process * accumulated)
    lines = [
        f"effective batch    {batch} images: {per_process} a forward, {accumulated} forwards, {processes} processes",
        f"learning rate      {lr:.3g} (base_lr {config.optim.base_lr:g}, {config.optim.scaling_rule})",
        f"steps              {config.optim.steps}, {config.optim.warmup_steps} of them warm-up",
        f"images seen        {images:,}, {images / num_images:.2f} passes over {num_images:,} images",
        f"parameters         {sum(parameters.values()):,} trained: "
        + ", ".join(f"{name} {count:,}" for name, count in parameters.items()),
        f"memory estimate    {_size(memory['total'])} per process: "
        + ", ".join(f"{name} {_size(size)}" for name, size in memory.items() if name != "total"),
    ]
    return "\n".join(lines)


def _size(gib: float) -> str:
    return f"{gib:.1f} GiB" if gib >= 1 else f"{gib * 1024:.0f} MiB"
