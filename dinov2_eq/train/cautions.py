"""Warnings about settings that run, but train nothing or not what was meant."""

from collections.abc import Iterator

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.schema import Config
from dinov2_eq.settings import OptimConfig, TeacherConfig


def cautions(config: Config) -> list[str]:
    """Returns a sentence for each setting that runs but trains nothing useful, with its value and a remedy."""
    context = objective_context(config)
    sections = config.objectives().items()
    found = [sentence for name, section in sections for sentence in section.cautions(name, context)]
    if config.needs().teacher:
        found += _teacher(config.teacher)
    return [*found, *_frozen(config.optim)]


def _teacher(teacher: TeacherConfig) -> Iterator[str]:
    if teacher.momentum_teacher == teacher.final_momentum_teacher == 1:
        yield "teacher.momentum_teacher=1 until the end: the teacher never moves. Lower it, for example to 0.992"


def _frozen(optim: OptimConfig) -> Iterator[str]:
    for key, length, what in (
        ("optim.freeze_backbone_steps", optim.freeze_backbone_steps, "backbone"),
        ("optim.freeze_last_layer_steps", optim.freeze_last_layer_steps, "last layer of the heads"),
    ):
        if length >= optim.steps:
            yield f"{key}={length} of optim.steps={optim.steps}: the {what} is never trained. Lower it"
