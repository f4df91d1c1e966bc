"""Sections of a training config that no loss term owns: the classes are the documentation and the defaults.

A section is a dataclass. Each field is a `setting` that says what it means and which values it takes, and the section
is passed as a whole to the code that reads it. Keys keep DINOv2's names where the meaning is the same; every length is
in optimizer steps. The settings of a loss term are in its file below `dinov2_eq/objectives/`.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

LARGEST_HUE = 0.5  # turns: half of the colour circle to each side
LOW_HIGH = ("low", "high")


def setting(
    default: Any,
    meaning: str,
    *,
    interval: str = "",
    choices: Sequence[Any] = (),
    elements: Sequence[str] = (),
) -> Any:
    """Declares a field of a section.

    Args:
        default: default value; a list is copied for each instance.
        meaning: one line for the reference of settings.
        interval: range of the number, or of each number of a list, such as "[0, 1)". A round bracket excludes the end;
            NaN lies in no interval.
        choices: allowed values.
        elements: names of the numbers of a list. `LOW_HIGH` requires low <= high.
    """
    metadata = {"meaning": meaning, "interval": interval, "choices": tuple(choices), "elements": tuple(elements)}
    if isinstance(default, list):
        return field(default_factory=lambda: copy.copy(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def problems_of(section: str, values: Any) -> Iterator[str]:
    """Yields a sentence for each field of a section whose value is not allowed."""
    for each in fields(values):
        key, value, rule = f"{section}.{each.name}", getattr(values, each.name), each.metadata
        names, interval, elements = rule["choices"], rule["interval"], rule["elements"]
        if names and value not in names:
            yield f"{key}={value!r} is not one of {', '.join(map(str, names))}"
        if elements and len(value) != len(elements):
            yield f"{key}={value} must have {len(elements)} numbers: [{', '.join(elements)}]"
        elif elements == LOW_HIGH and value[0] > value[1]:
            yield f"{key}={value} must be [low, high] with low <= high; swap them"
        if interval and isinstance(value, list):
            if not all(lies_in(element, interval) for element in value):
                yield f"{key}={value}: each number must lie in {interval}"
        elif interval and value is not None and not lies_in(value, interval):
            yield f"{key}={value} must lie in {interval}"


def lies_in(value: float, interval: str) -> bool:
    """Returns whether a number lies in an interval such as "[0, 1)"; NaN lies in none."""
    low, high = map(float, interval[1:-1].split(","))
    return low <= value <= high and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]")


@dataclass
class ComputePrecisionConfig:
    dtype: str = setting(
        "auto",
        "autocast dtype: auto (bf16 on a GPU, fp32 on a CPU), fp32 or bf16; weights and losses stay fp32",
        choices=("auto", "fp32", "bf16"),
    )


@dataclass
class FsdpConfig:
    strategy: str = setting(
        "grad_op",
        "ddp, full, grad_op or hybrid, see docs/scaling.md; none: a single process only",
        choices=("none", "ddp", "full", "grad_op", "hybrid"),
    )
    activation_checkpointing: bool = setting(False, "recompute each block in the backward pass: less memory, more time")
    compile: bool = setting(False, "torch.compile of each block")


@dataclass
class StudentConfig:
    pretrained_weights: str = setting("", "weights to start from, see docs/continue.md; empty: random weights")
    arch: str = setting("vit_large", "the backbone: a name of `dinov2_eq.models.BACKBONES`")
    depth: int | None = setting(None, "number of blocks; null: the architecture's own", interval="[1, inf)")
    embed_dim: int | None = setting(None, "width of the tokens; null: the architecture's own", interval="[1, inf)")
    num_heads: int | None = setting(None, "attention heads; null: the architecture's own", interval="[1, inf)")
    mlp_ratio: float = setting(4.0, "width of the feed-forward layer over that of the tokens", interval="(0, inf)")
    patch_size: int = setting(16, "side of a patch in pixels", interval="[1, inf)")
    patch_embed: str = setting(
        "linear", "linear: one layer on each patch (ViT); conv: convolutions of stride 2", choices=("linear", "conv")
    )
    drop_path_rate: float = setting(0.3, "stochastic depth", interval="[0, 1)")
    drop_path_uniform: bool = setting(True, "true: the same rate in every block; false: linear from 0 to the rate")
    layerscale: float = setting(1.0e-5, "initial LayerScale; 0: none", interval="[0, inf)")
    ffn_layer: str | None = setting(
        None, "mlp or swiglu; null: the architecture's own", choices=(None, "mlp", "swiglu", "swiglufused")
    )
    qkv_bias: bool = setting(True, "bias of the query, key and value layers")
    proj_bias: bool = setting(True, "bias of the layer after attention")
    ffn_bias: bool = setting(True, "biases of the feed-forward layers")
    num_register_tokens: int = setting(0, "extra tokens without position", interval="[0, inf)")
    interpolate_antialias: bool = setting(False, "antialias position embeddings at other image sizes")
    interpolate_offset: float = setting(0.1, "0.1 as DINOv2 without registers, 0 with", interval="[0, inf)")
    attention: str = setting("auto", "attention kernel", choices=("auto", "sdpa", "xformers"))


@dataclass
class TeacherConfig:
    momentum_teacher: float = setting(0.992, "EMA momentum at the start", interval="[0, 1]")
    final_momentum_teacher: float = setting(1.0, "EMA momentum at the end (cosine)", interval="[0, 1]")
    warmup_teacher_temp: float = setting(0.04, "temperature of the targets at the start", interval="(0, inf)")
    teacher_temp: float = setting(0.07, "temperature after the warm-up (linear)", interval="(0, inf)")
    warmup_teacher_temp_steps: int = setting(37500, "length of the warm-up", interval="[0, inf)")


@dataclass
class OptimConfig:
    steps: int = setting(125000, "optimizer updates in the whole run", interval="[1, inf)")
    warmup_steps: int = setting(12500, "linear warm-up of the learning rate", interval="[0, inf)")
    base_lr: float = setting(0.004, "for 1024 images; scaled by scaling_rule", interval="(0, inf)")
    scaling_rule: str = setting(
        "sqrt_wrt_1024",
        "how the learning rate grows with the global batch size",
        choices=("sqrt_wrt_1024", "linear_wrt_256", "none"),
    )
    min_lr: float = setting(1.0e-6, "learning rate at the end (cosine), not scaled", interval="[0, inf)")
    weight_decay: float = setting(0.04, "weight decay at the start", interval="[0, inf)")
    weight_decay_end: float = setting(0.4, "weight decay at the end (cosine)", interval="[0, inf)")
    freeze_backbone_steps: int = setting(
        0, "steps that leave the backbone unchanged while new heads learn", interval="[0, inf)"
    )
    clip_grad: float = setting(3.0, "largest gradient norm of each clipped group; 0: no clipping", interval="[0, inf)")
    clip_grad_per: str = setting(
        "module",
        "what is clipped together: each module (DINOv2) or each tensor (DINO, iBOT)",
        choices=("module", "tensor"),
    )
    freeze_last_layer_steps: int = setting(
        1250, "steps that leave the prototypes at their initial values", interval="[0, inf)"
    )
    patch_embed_lr_mult: float = setting(0.2, "factor of the patch embedding's learning rate", interval="[0, inf)")
    layerwise_decay: float = setting(
        0.9, "factor of the learning rate for each block further from the output", interval="(0, 1]"
    )
    adamw_beta1: float = setting(0.9, "decay of the gradient average", interval="[0, 1)")
    adamw_beta2: float = setting(0.999, "decay of the squared gradient average", interval="[0, 1)")


@dataclass
class CropsConfig:
    global_crops_scale: list[float] = setting(
        [0.32, 1.0], "share of the image's area", interval="(0, 1]", elements=LOW_HIGH
    )
    local_crops_scale: list[float] = setting(
        [0.05, 0.32], "share of the image's area", interval="(0, 1]", elements=LOW_HIGH
    )
    local_crops_number: int = setting(
        8, "local crops of each image, for the objectives that use them", interval="[0, inf)"
    )
    global_crops_size: int = setting(224, "side in pixels", interval="[0, inf)")
    local_crops_size: int = setting(96, "side in pixels", interval="[0, inf)")
    horizontal_flip: float = setting(0.5, "probability", interval="[0, 1]")
    max_rotation_deg: float = setting(
        0.0,
        "every view is turned by its own angle, uniform in [-max, max] degrees, so that base losses do not care how an "
        "image lies: for images without an up; 0: none is turned",
        interval="[0, 180]",
    )
    jitter_prob: float = setting(0.8, "probability of colour jitter", interval="[0, 1]")
    jitter: list[float] = setting(
        [0.4, 0.4, 0.2, 0.1],
        f"largest change of brightness, contrast, saturation, and hue in turns (at most {LARGEST_HUE})",
        interval="[0, 1]",
        elements=("brightness", "contrast", "saturation", "hue"),
    )
    grey_prob: float = setting(0.2, "probability of greyscale", interval="[0, 1]")
    blur_prob: list[float] = setting(
        [0.0, 0.9, 0.5],
        "global 1, global 2, local: as DINOv2 ran",
        interval="[0, 1]",
        elements=("global 1", "global 2", "local"),
    )
    solarize_prob: float = setting(0.2, "probability for the second global crop", interval="[0, 1]")
    mean: list[float] = setting(
        [0.485, 0.456, 0.406], "mean of the pixels in [0, 1]", interval="[0, 1]", elements=("red", "green", "blue")
    )
    std: list[float] = setting(
        [0.229, 0.224, 0.225],
        "standard deviation of the pixels in [0, 1]",
        interval="(0, inf)",
        elements=("red", "green", "blue"),
    )


@dataclass
class TrainConfig:
    dataset_path: str = setting("Shapes:split=TRAIN", "data string, see README")
    batch_size_per_gpu: int = setting(64, "images in one forward of one process", interval="[1, inf)")
    accumulation_steps: int = setting(1, "forwards in one optimizer step", interval="[1, inf)")
    centering: str = setting(
        "centering", "how the teacher's outputs become targets", choices=("centering", "sinkhorn_knopp")
    )
    seed: int = setting(
        0, "governs initial weights, order, crops, masks, augmentation and transforms", interval="[0, inf)"
    )
    known_share: float = setting(
        1.0,
        "share of the images, always the same ones, of which objectives that read theta are told theta",
        interval="(0, 1]",
    )
    num_workers: int = setting(10, "data-loading processes of each process", interval="[0, inf)")
    max_corrupt_share: float = setting(
        0.01, "stop the run when a larger share of the images read is unreadable", interval="[0, 1]"
    )
    log_period_steps: int = setting(10, "steps between two log lines", interval="[1, inf)")
    checkpoint_period_steps: int = setting(1250, "steps between two checkpoints", interval="[1, inf)")
    keep_checkpoints: int = setting(3, "number of recent checkpoints to keep", interval="[1, inf)")
    keep_checkpoint_every_steps: int = setting(
        0, "also keep every checkpoint at a multiple of this; 0: none", interval="[0, inf)"
    )
    lost_rank_timeout_s: float = setting(
        120.0, "stop the run when a process has not responded for this long", interval="[20, inf)"
    )
    device: str = setting("auto", "where training runs", choices=("auto", "cpu", "cuda"))


@dataclass
class EvaluationConfig:
    eval_period_steps: int = setting(
        12500,
        "steps between two eval/training_<step>/teacher_checkpoint.pth; one is also written at the end; "
        "0: at the end only",
        interval="[0, inf)",
    )
    sample_period_steps: int = setting(
        1250,
        "steps between two samples/step_<step>.npz: views, targets, reconstructions; 0: none",
        interval="[0, inf)",
    )
    knn_period_steps: int = setting(0, "steps between two online k-NN evaluations; 0: none", interval="[0, inf)")
    knn_train_dataset: str = setting("", "labelled data string; required where knn_period_steps > 0")
    knn_val_dataset: str = setting("", "labelled data string; required where knn_period_steps > 0")
    knn_max_images: int = setting(
        10000, "images of each of the two, the first ones of a fixed shuffle", interval="[1, inf)"
    )
    knn_k: int = setting(20, "neighbours", interval="[1, inf)")
