"""Rules of the config that a type cannot say; every broken one is reported, each with key, value and fix."""

from collections.abc import Iterator

from dinov2_eq.config.schema import Config


def check(config: Config) -> None:
    """Raises ValueError listing everything in the config that cannot run."""
    problems = [
        *_choices(config),
        *_ranges(config),
        *_crops(config),
        *_equivariance(config),
        *_lengths(config),
        *_terms(config),
    ]
    if problems:
        raise ValueError("The config cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _choices(config: Config) -> Iterator[str]:
    allowed = {
        "compute_precision.dtype": (config.compute_precision.dtype, ("auto", "fp32", "bf16")),
        "student.ffn_layer": (config.student.ffn_layer, (None, "mlp", "swiglu", "swiglufused")),
        "student.attention": (config.student.attention, ("auto", "sdpa", "xformers")),
        "optim.scaling_rule": (config.optim.scaling_rule, ("sqrt_wrt_1024", "linear_wrt_256", "none")),
        "train.centering": (config.train.centering, ("centering", "sinkhorn_knopp")),
        "train.device": (config.train.device, ("auto", "cpu", "cuda")),
        "equivariance.border": (config.equivariance.border, ("zeros", "canvas")),
    }
    for key, (value, names) in allowed.items():
        if value not in names:
            yield f"{key}={value!r} is not one of {', '.join(map(str, names))}"


def _ranges(config: Config) -> Iterator[str]:
    crops, equivariance, train = config.crops, config.equivariance, config.train
    shares = {
        "crops.global_crops_scale": crops.global_crops_scale,
        "crops.local_crops_scale": crops.local_crops_scale,
        "ibot.mask_ratio_min_max": config.ibot.mask_ratio_min_max,
    }
    for key, value in shares.items():
        if len(value) != 2 or not 0 <= value[0] <= value[1] <= 1:
            yield f"{key}={value} must be two shares [low, high] with 0 <= low <= high <= 1"
    low_high = equivariance.blur_sigma_min_max
    if len(low_high) != 2 or not 0 <= low_high[0] <= low_high[1]:
        yield f"equivariance.blur_sigma_min_max={low_high} must be [low, high] in pixels with 0 <= low <= high"
    probabilities = {
        "crops.horizontal_flip": [crops.horizontal_flip],
        "crops.jitter_prob": [crops.jitter_prob],
        "crops.grey_prob": [crops.grey_prob],
        "crops.blur_prob": crops.blur_prob,
        "crops.solarize_prob": [crops.solarize_prob],
        "ibot.mask_sample_probability": [config.ibot.mask_sample_probability],
        "train.max_corrupt_share": [train.max_corrupt_share],
        "student.drop_path_rate": [config.student.drop_path_rate],
    }
    for key, values in probabilities.items():
        if any(not 0 <= value <= 1 for value in values):
            yield f"{key}={values if len(values) > 1 else values[0]} must lie in [0, 1]"
    for key, value, length in (
        ("crops.blur_prob", crops.blur_prob, 3),
        ("crops.jitter", crops.jitter, 4),
        ("crops.mean", crops.mean, 3),
        ("crops.std", crops.std, 3),
    ):
        if len(value) != length:
            yield f"{key}={value} must have {length} values"
    positive = {
        "train.batch_size_per_gpu": train.batch_size_per_gpu,
        "train.accumulation_steps": train.accumulation_steps,
        "train.log_period_steps": train.log_period_steps,
        "train.checkpoint_period_steps": train.checkpoint_period_steps,
        "train.keep_checkpoints": train.keep_checkpoints,
        "optim.steps": config.optim.steps,
        "student.patch_size": config.student.patch_size,
        "evaluation.knn_k": config.evaluation.knn_k,
    }
    if config.student.depth is not None:
        positive["student.depth"] = config.student.depth
    for key, value in positive.items():
        if value < 1:
            yield f"{key}={value} must be at least 1"
    counts = {
        "train.seed": train.seed,
        "train.num_workers": train.num_workers,
        "crops.local_crops_number": crops.local_crops_number,
        "student.num_register_tokens": config.student.num_register_tokens,
        "evaluation.eval_period_steps": config.evaluation.eval_period_steps,
        "evaluation.sample_period_steps": config.evaluation.sample_period_steps,
        "evaluation.knn_period_steps": config.evaluation.knn_period_steps,
    }
    for key, value in counts.items():
        if value < 0:
            yield f"{key}={value} must not be negative"


def _crops(config: Config) -> Iterator[str]:
    patch = config.student.patch_size
    sizes = {"crops.global_crops_size": config.crops.global_crops_size}
    if config.crops.local_crops_number > 0:
        sizes["crops.local_crops_size"] = config.crops.local_crops_size
    for key, size in sizes.items():
        if patch >= 1 and (size < patch or size % patch):
            nearest = max(round(size / patch), 1) * patch
            yield f"{key}={size} is not a multiple of student.patch_size={patch}; the nearest is {nearest}"


def _equivariance(config: Config) -> Iterator[str]:
    task = config.equivariance
    if not task.enabled:
        return
    if not 1 <= task.equivariant_dim < task.patch_dim:
        yield (
            f"equivariance.equivariant_dim={task.equivariant_dim} must be at least 1 and less than "
            f"equivariance.patch_dim={task.patch_dim}, or nothing is left for the base losses"
        )
    if task.num_intermediates < 1:
        yield (
            f"equivariance.num_intermediates={task.num_intermediates} must be at least 1; "
            "for a run without reconstruction set equivariance.loss_weight=0 or equivariance.enabled=false"
        )
    if task.loss_weight < 0:
        yield f"equivariance.loss_weight={task.loss_weight} must not be negative"


def _lengths(config: Config) -> Iterator[str]:
    steps = config.optim.steps
    phases = {
        "optim.warmup_steps": config.optim.warmup_steps,
        "optim.freeze_last_layer_steps": config.optim.freeze_last_layer_steps,
        "teacher.warmup_teacher_temp_steps": config.teacher.warmup_teacher_temp_steps,
    }
    for key, length in phases.items():
        if not 0 <= length <= steps:
            yield f"{key}={length} must lie between 0 and optim.steps={steps}; lower it, or train longer"


def _terms(config: Config) -> Iterator[str]:
    for key, weight in (
        ("dino.loss_weight", config.dino.loss_weight),
        ("dino.koleo_loss_weight", config.dino.koleo_loss_weight),
        ("ibot.loss_weight", config.ibot.loss_weight),
    ):
        if weight < 0:
            yield f"{key}={weight} must not be negative"
    if config.dino.loss_weight == 0 and config.ibot.loss_weight == 0:
        yield "dino.loss_weight=0 and ibot.loss_weight=0 leave no base loss; give at least one a positive weight"
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
