"""Rules of the config that a type cannot say; every broken one is reported, each with key, value and fix.

Names and sizes that belong to other folders are repeated here, as importing those means loading torch for every look at
a config. tests/config/test_checks.py keeps the two equal.
"""

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from dinov2_eq.config.schema import Config

CROSS_ATTENTION_HEAD_DIM = 64
LARGEST_HUE = 0.5  # turns: half of the colour circle to each side

CHOICES = {
    "compute_precision.dtype": ("auto", "fp32", "bf16"),
    "student.arch": ("vit_tiny", "vit_small", "vit_base", "vit_large", "vit_giant2"),
    "student.ffn_layer": (None, "mlp", "swiglu", "swiglufused"),
    "student.attention": ("auto", "sdpa", "xformers"),
    "optim.scaling_rule": ("sqrt_wrt_1024", "linear_wrt_256", "none"),
    "train.centering": ("centering", "sinkhorn_knopp"),
    "train.device": ("auto", "cpu", "cuda"),
    "fsdp.strategy": ("none", "ddp", "full", "grad_op", "hybrid"),
    "equivariance.border": ("zeros", "canvas"),
    "equivariance.decoder": ("conv", "cross_attention"),
}

# The interval that every number of the schema, or each number of a list, must lie in. A round bracket leaves the end
# out; NaN and infinity lie in none.
INTERVALS = {
    "dino.loss_weight": "[0, inf)",
    "dino.head_n_prototypes": "[1, inf)",
    "dino.head_bottleneck_dim": "[1, inf)",
    "dino.head_nlayers": "[1, inf)",
    "dino.head_hidden_dim": "[1, inf)",
    "dino.koleo_loss_weight": "[0, inf)",
    "ibot.loss_weight": "[0, inf)",
    "ibot.mask_sample_probability": "[0, 1]",
    "ibot.mask_ratio_min_max": "[0, 1]",
    "ibot.head_n_prototypes": "[1, inf)",
    "ibot.head_bottleneck_dim": "[1, inf)",
    "ibot.head_nlayers": "[1, inf)",
    "ibot.head_hidden_dim": "[1, inf)",
    "equivariance.loss_weight": "[0, inf)",
    "equivariance.num_intermediates": "[0, inf)",
    "equivariance.patch_dim": "[1, inf)",
    "equivariance.equivariant_dim": "[1, inf)",
    "equivariance.decoder_dim": "[1, inf)",
    "equivariance.decoder_depth": "[0, inf)",
    "equivariance.max_angle_deg": "[0, 180]",
    "equivariance.max_shift": "[0, 1)",
    "equivariance.max_color": "[0, 1]",
    "equivariance.max_hue": f"[0, {LARGEST_HUE}]",
    "equivariance.blur_sigma_min_max": "[0, inf)",
    "student.depth": "[1, inf)",
    "student.patch_size": "[1, inf)",
    "student.drop_path_rate": "[0, 1)",
    "student.layerscale": "[0, inf)",
    "student.num_register_tokens": "[0, inf)",
    "student.interpolate_offset": "[0, inf)",
    "teacher.momentum_teacher": "[0, 1]",
    "teacher.final_momentum_teacher": "[0, 1]",
    "teacher.warmup_teacher_temp": "(0, inf)",
    "teacher.teacher_temp": "(0, inf)",
    "teacher.warmup_teacher_temp_steps": "[0, inf)",
    "optim.steps": "[1, inf)",
    "optim.warmup_steps": "[0, inf)",
    "optim.base_lr": "(0, inf)",
    "optim.min_lr": "[0, inf)",
    "optim.weight_decay": "[0, inf)",
    "optim.weight_decay_end": "[0, inf)",
    "optim.clip_grad": "[0, inf)",
    "optim.freeze_last_layer_steps": "[0, inf)",
    "optim.freeze_backbone_steps": "[0, inf)",
    "optim.patch_embed_lr_mult": "[0, inf)",
    "optim.layerwise_decay": "(0, 1]",
    "optim.adamw_beta1": "[0, 1)",
    "optim.adamw_beta2": "[0, 1)",
    "crops.global_crops_scale": "(0, 1]",
    "crops.local_crops_scale": "(0, 1]",
    "crops.local_crops_number": "[0, inf)",
    "crops.global_crops_size": "[0, inf)",
    "crops.local_crops_size": "[0, inf)",
    "crops.horizontal_flip": "[0, 1]",
    "crops.jitter_prob": "[0, 1]",
    "crops.jitter": "[0, 1]",  # hue: at most LARGEST_HUE, see _crops
    "crops.grey_prob": "[0, 1]",
    "crops.blur_prob": "[0, 1]",
    "crops.solarize_prob": "[0, 1]",
    "crops.mean": "[0, 1]",
    "crops.std": "(0, inf)",
    "train.batch_size_per_gpu": "[1, inf)",
    "train.accumulation_steps": "[1, inf)",
    "train.seed": "[0, inf)",
    "train.num_workers": "[0, inf)",
    "train.max_corrupt_share": "[0, 1]",
    "train.log_period_steps": "[1, inf)",
    "train.checkpoint_period_steps": "[1, inf)",
    "train.keep_checkpoints": "[1, inf)",
    "train.keep_checkpoint_every_steps": "[0, inf)",
    "train.lost_rank_timeout_s": "[20, inf)",
    "evaluation.eval_period_steps": "[0, inf)",
    "evaluation.sample_period_steps": "[0, inf)",
    "evaluation.knn_period_steps": "[0, inf)",
    "evaluation.knn_max_images": "[1, inf)",
    "evaluation.knn_k": "[1, inf)",
}

ELEMENTS = {
    "ibot.mask_ratio_min_max": ("low", "high"),
    "crops.global_crops_scale": ("low", "high"),
    "crops.local_crops_scale": ("low", "high"),
    "equivariance.blur_sigma_min_max": ("low", "high"),
    "crops.blur_prob": ("global 1", "global 2", "local"),
    "crops.jitter": ("brightness", "contrast", "saturation", "hue"),
    "crops.mean": ("red", "green", "blue"),
    "crops.std": ("red", "green", "blue"),
}


def check(config: Config) -> None:
    """Raises ValueError listing everything in the config that cannot run."""
    problems = [
        *_choices(config),
        *_intervals(config),
        *_elements(config),
        *_crops(config),
        *_equivariance(config),
        *_lengths(config),
        *_terms(config),
    ]
    if problems:
        raise ValueError("The config cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _rows(config: Config, table: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, value, rule) of a table; a disabled task has no rules."""
    for key, rule in table.items():
        if config.equivariance.enabled or not key.startswith("equivariance."):
            yield key, attrgetter(key)(config), rule


def _choices(config: Config) -> Iterator[str]:
    for key, value, names in _rows(config, CHOICES):
        if value not in names:
            yield f"{key}={value!r} is not one of {', '.join(map(str, names))}"


def _intervals(config: Config) -> Iterator[str]:
    for key, value, interval in _rows(config, INTERVALS):
        if isinstance(value, list):
            if not all(lies_in(element, interval) for element in value):
                yield f"{key}={value}: each number must lie in {interval}"
        elif value is not None and not lies_in(value, interval):
            yield f"{key}={value} must lie in {interval}"


def lies_in(value: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 1)"; NaN is in none."""
    low, high = map(float, interval[1:-1].split(","))
    return low <= value <= high and (value != low or interval[0] == "[") and (value != high or interval[-1] == "]")


def _elements(config: Config) -> Iterator[str]:
    for key, value, names in _rows(config, ELEMENTS):
        if len(value) != len(names):
            yield f"{key}={value} must have {len(names)} numbers: [{', '.join(names)}]"
        elif names == ("low", "high") and value[0] > value[1]:
            yield f"{key}={value} must be [low, high] with low <= high; swap them"


def _crops(config: Config) -> Iterator[str]:
    crops, patch = config.crops, config.student.patch_size
    sizes = {"crops.global_crops_size": crops.global_crops_size}
    if crops.local_crops_number > 0:
        sizes["crops.local_crops_size"] = crops.local_crops_size
    for key, size in sizes.items():
        if patch >= 1 and (size < patch or size % patch):
            nearest = max(round(size / patch), 1) * patch
            yield f"{key}={size} is not a multiple of student.patch_size={patch}; the nearest is {nearest}"
    if crops.jitter[3:] and crops.jitter[3] > LARGEST_HUE:
        yield f"crops.jitter={crops.jitter}: the fourth number, hue in turns, must lie in [0, {LARGEST_HUE}]"


def _equivariance(config: Config) -> Iterator[str]:
    task = config.equivariance
    if not task.enabled:
        return
    if task.equivariant_dim >= task.patch_dim:
        yield (
            f"equivariance.equivariant_dim={task.equivariant_dim} must be less than "
            f"equivariance.patch_dim={task.patch_dim}, or nothing is left for the base losses"
        )
    if task.num_intermediates == 0:
        yield (
            "equivariance.num_intermediates=0 must be at least 1; "
            "for a run without reconstruction set equivariance.loss_weight=0 or equivariance.enabled=false"
        )
    if task.decoder == "cross_attention" and task.decoder_dim % CROSS_ATTENTION_HEAD_DIM:
        yield (
            f"equivariance.decoder_dim={task.decoder_dim} must be a multiple of {CROSS_ATTENTION_HEAD_DIM}, "
            "the width of a head, for equivariance.decoder=cross_attention"
        )


def _lengths(config: Config) -> Iterator[str]:
    for key in (
        "optim.warmup_steps",
        "optim.freeze_last_layer_steps",
        "optim.freeze_backbone_steps",
        "teacher.warmup_teacher_temp_steps",
    ):
        length = attrgetter(key)(config)
        if length > config.optim.steps:
            yield f"{key}={length} is more than optim.steps={config.optim.steps}; lower it, or train longer"


def _terms(config: Config) -> Iterator[str]:
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0:
        yield "dino.loss_weight=0 and ibot.loss_weight=0 leave no base loss; give at least one a positive weight"
    num_crops = 2 * config.train.batch_size_per_gpu * config.train.accumulation_steps
    share = config.ibot.mask_sample_probability
    if config.ibot.loss_weight > 0 and 0 <= share <= 1 and num_crops > 0 and int(num_crops * share) == 0:
        yield (
            f"ibot.mask_sample_probability={share} masks none of the {num_crops} global crops of a step, so iBOT has "
            f"nothing to learn from; raise it above 1/{num_crops}, enlarge the batch, or set ibot.loss_weight=0"
        )
    evaluation = config.evaluation
    if evaluation.knn_period_steps > 0:
        for key, value in (
            ("evaluation.knn_train_dataset", evaluation.knn_train_dataset),
            ("evaluation.knn_val_dataset", evaluation.knn_val_dataset),
        ):
            if not value:
                yield (
                    f"{key} is empty but evaluation.knn_period_steps={evaluation.knn_period_steps}; "
                    "give a labelled data string"
                )
