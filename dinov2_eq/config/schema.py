"""The sections of a training config: those of `dinov2_eq.settings` and one for each entry of `OBJECTIVES`."""

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache

from dinov2_eq.data.datasets import pair_components
from dinov2_eq.equivariance.pairing import NoPairing, Pairing, RenderedPairing
from dinov2_eq.objectives import OBJECTIVES
from dinov2_eq.objectives.base import Needs, ObjectiveSettings, union
from dinov2_eq.settings import (
    ComputePrecisionConfig,
    CropsConfig,
    EvaluationConfig,
    FsdpConfig,
    OptimConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)


@dataclass
class Config:
    """A whole training config. Instances come from `default_config`, with a section for each entry of `OBJECTIVES`."""

    compute_precision: ComputePrecisionConfig = field(default_factory=ComputePrecisionConfig)
    fsdp: FsdpConfig = field(default_factory=FsdpConfig)
    student: StudentConfig = field(default_factory=StudentConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    crops: CropsConfig = field(default_factory=CropsConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def objectives(self) -> dict[str, ObjectiveSettings]:
        """Returns the sections of the objectives by name."""
        return {name: getattr(self, name) for name in OBJECTIVES}

    def needs(self) -> Needs:
        """Returns what all objectives together need.

        Raises:
            ValueError: two of them contradict each other.
        """
        return union({name: section.needs() for name, section in self.objectives().items()})

    def pairing(self) -> Pairing:
        """Returns where the second view comes from: the transform g of an objective, else the training data's pairs.

        Without either, it is another crop of the image.

        Raises:
            ValueError: two objectives need different ones, or g cannot be built.
        """
        if wanted := self.needs().pairing:
            return wanted()
        components = pair_components(self.train.dataset_path)
        return NoPairing() if components is None else RenderedPairing(components)


def default_config() -> Config:
    """Returns a config with the defaults of every section."""
    return _config_type(tuple(OBJECTIVES.items()))()


@cache
def _config_type(objectives: tuple[tuple[str, type[ObjectiveSettings]], ...]) -> type[Config]:
    sections = [(name, settings, field(default_factory=settings)) for name, settings in objectives]
    return make_dataclass("Config", sections, bases=(Config,))


def sections_of(config: Config) -> dict[str, object]:
    """Returns all sections by name, the objectives' first."""
    return config.objectives() | {each.name: getattr(config, each.name) for each in fields(Config)}
