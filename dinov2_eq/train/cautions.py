"""Settings that can run, but train nothing or not what was meant."""

from collections.abc import Iterator

from dinov2_eq.config.schema import Config
from dinov2_eq.data.masking import BlockMasking
from dinov2_eq.train.build import build_task_transform, patch_grid

NUM_MASKS = 256  # drawn to see whether any patch is ever masked


def cautions(config: Config) -> list[str]:
    """A sentence for each such setting, with its value and what to do; [] where all is well."""
    return [*_masks(config), *_prototypes(config), *_transform(config), *_batch(config), *_what_never_moves(config)]


def _masks(config: Config) -> Iterator[str]:
    ibot = config.ibot
    if ibot.loss_weight == 0:
        return
    masking = BlockMasking(patch_grid(config), ibot.mask_ratio_min_max, sample_probability=1.0)
    if not masking(NUM_MASKS, range(NUM_MASKS), config.train.seed, step=0).any():
        height, width = patch_grid(config)
        yield (
            f"iBOT learns next to nothing: in {NUM_MASKS} trial masks no patch was masked, "
            f"ibot.mask_ratio_min_max={ibot.mask_ratio_min_max} of the {height} x {width} patches of a global crop. "
            "Raise it, take larger crops or smaller patches, or set ibot.loss_weight=0"
        )


def _prototypes(config: Config) -> Iterator[str]:
    dino, ibot = config.dino, config.ibot
    shared = ibot.loss_weight > 0 and not ibot.separate_head
    for key, number, is_used in (
        ("dino.head_n_prototypes", dino.head_n_prototypes, dino.loss_weight > 0 or shared),
        ("ibot.head_n_prototypes", ibot.head_n_prototypes, ibot.loss_weight > 0 and ibot.separate_head),
    ):
        if is_used and number == 1:
            yield (
                f"{key}=1: with one prototype every answer is right and the loss always 0. Use many, for example 65536"
            )


def _transform(config: Config) -> Iterator[str]:
    transform = build_task_transform(config.equivariance)
    if transform is None or not (transform.low == transform.high).all():
        return
    values = zip(transform.components, transform.high.tolist(), strict=True)
    ranges = ", ".join(f"{name} {value:g}" for name, value in values)
    what = "does the same to every image" if transform.low.any() else "changes nothing"
    yield (
        f"equivariance.transform={config.equivariance.transform} {what} ({ranges}), so there is nothing to keep. Widen "
        "its range, or set equivariance.enabled=false"
    )


def _batch(config: Config) -> Iterator[str]:
    if config.train.batch_size_per_gpu == 1 and config.dino.koleo_loss_weight > 0:
        yield (
            f"dino.koleo_loss_weight={config.dino.koleo_loss_weight} has no effect with train.batch_size_per_gpu=1: "
            "KoLeo compares the images of a batch. Enlarge it, or set the weight to 0"
        )


def _what_never_moves(config: Config) -> Iterator[str]:
    optim, teacher = config.optim, config.teacher
    if teacher.momentum_teacher == teacher.final_momentum_teacher == 1:
        yield "teacher.momentum_teacher=1 until the end: the teacher never moves. Lower it, for example to 0.992"
    for key, length, what in (
        ("optim.freeze_backbone_steps", optim.freeze_backbone_steps, "backbone"),
        ("optim.freeze_last_layer_steps", optim.freeze_last_layer_steps, "last layer of the heads"),
    ):
        if length >= optim.steps:
            yield f"{key}={length} of optim.steps={optim.steps}: the {what} is never trained. Lower it"
