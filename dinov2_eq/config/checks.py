"""Checks of the config that types cannot express; reports all violations, each with key, value and fix."""

import math
from collections.abc import Iterator
from operator import attrgetter

from dinov2_eq.config.schema import Config, sections_of
from dinov2_eq.data.datasets import pair_components
from dinov2_eq.models import BACKBONES
from dinov2_eq.models.backbone import BackboneKind
from dinov2_eq.objectives.base import Context, ObjectiveSettings
from dinov2_eq.settings import LARGEST_HUE, CropsConfig, EvaluationConfig, StudentConfig, problems_of
from dinov2_eq.types import GLOBAL, LOCAL

# Settings in steps that cannot exceed optim.steps.
LENGTHS = (
    "optim.warmup_steps",
    "optim.freeze_last_layer_steps",
    "optim.freeze_backbone_steps",
    "teacher.warmup_teacher_temp_steps",
)


def check(config: Config) -> None:
    """Raises ValueError listing everything in the config that cannot run."""
    problems = [*_values(config), *_lengths(config), *_online_knn(config.evaluation)]
    student = config.student
    if student.arch in BACKBONES:
        kind = BACKBONES[student.arch]
        problems += [*_crops(config.crops, kind, student), *_objectives(config, kind)]
    else:
        problems.append(f"student.arch={student.arch!r} is not one of {', '.join(BACKBONES)}")
    if problems:
        raise ValueError("The config cannot run:\n" + "\n".join(f"  - {problem}" for problem in problems))


def objective_context(config: Config) -> Context:
    """Returns the settings of other sections that objectives may depend on."""
    crops, patch_size = config.crops, max(BACKBONES[config.student.arch].patch_size(config.student), 1)
    side = math.ceil(crops.global_crops_size / patch_size)
    batch = config.train.batch_size_per_gpu
    return Context(
        sections=config.objectives(),
        crop_sizes={GLOBAL: crops.global_crops_size, LOCAL: crops.local_crops_size},
        patch_size=patch_size,
        grid=(side, side),
        batch_size=batch,
        step_images=batch * config.train.accumulation_steps,
        attention=config.student.attention,
        centering=config.train.centering,
        seed=config.train.seed,
        pairing=config.pairing,
    )


def _values(config: Config) -> Iterator[str]:
    for name, section in sections_of(config).items():
        if not isinstance(section, ObjectiveSettings) or section.is_used():
            yield from problems_of(name, section)


def _crops(crops: CropsConfig, kind: BackboneKind, student: StudentConfig) -> Iterator[str]:
    patch, sizes = kind.patch_size(student), {}
    if kind.whole_patches:
        sizes["crops.global_crops_size"] = crops.global_crops_size
        if crops.local_crops_number > 0:
            sizes["crops.local_crops_size"] = crops.local_crops_size
    for key, size in sizes.items():
        if patch >= 1 and (size < patch or size % patch):
            nearest = max(round(size / patch), 1) * patch
            yield f"{key}={size} is not a multiple of student.patch_size={patch}; the nearest is {nearest}"
    if crops.jitter[3:] and crops.jitter[3] > LARGEST_HUE:
        yield f"crops.jitter={crops.jitter}: the fourth number, hue in turns, must lie in [0, {LARGEST_HUE}]"


def _lengths(config: Config) -> Iterator[str]:
    for key in LENGTHS:
        length = attrgetter(key)(config)
        if length > config.optim.steps:
            yield f"{key}={length} is more than optim.steps={config.optim.steps}; lower it, or train longer"


def _objectives(config: Config, kind: BackboneKind) -> Iterator[str]:
    context = objective_context(config)
    sections = {name: section for name, section in config.objectives().items() if section.is_used()}
    for name, section in sections.items():
        yield from section.problems(name, context)
    weights = [weight for section in sections.values() for weight in section.weights().values()]
    if not any(weight > 0 for weight in weights):
        yield "every loss_weight is 0, so there is nothing to learn; set one above 0, for example dino.loss_weight=1"
    try:
        pairing = config.needs().pairing
    except ValueError as error:
        yield str(error)
        return
    for name, section in sections.items():
        if section.needs().theta and not (pairing or pair_components(config.train.dataset_path)):
            yield (
                f"{name} reads theta, which leads from one view to the other, and nothing gives it: "
                f"train.dataset_path={config.train.dataset_path!r} has no pairs of images with known parameters, and "
                "no objective has a transform g. Give such a data set of pairs, or a transform"
            )
        if not kind.masks_patches and section.needs().masks:
            yield (
                f"{name} masks patches, which student.arch={config.student.arch} does not support; set "
                f"{name}.loss_weight=0, or choose a vision transformer"
            )


def _online_knn(evaluation: EvaluationConfig) -> Iterator[str]:
    if evaluation.knn_period_steps > 0:
        for key in ("knn_train_dataset", "knn_val_dataset"):
            if not getattr(evaluation, key):
                yield (
                    f"evaluation.{key} is empty but evaluation.knn_period_steps={evaluation.knn_period_steps}; "
                    "give a labelled data string"
                )
