"""Table of the methods: one file and one line each. The key is the name of the config section."""

from dinov2_eq.objectives.augself import AugSelfConfig
from dinov2_eq.objectives.base import ObjectiveSettings
from dinov2_eq.objectives.dino import DinoConfig
from dinov2_eq.objectives.equimod import EquimodConfig
from dinov2_eq.objectives.ibot import IbotConfig
from dinov2_eq.objectives.order import OrderConfig
from dinov2_eq.objectives.reconstruction import EquivarianceConfig
from dinov2_eq.objectives.sie import SieConfig
from dinov2_eq.objectives.simclr import SimclrConfig
from dinov2_eq.objectives.vicreg import VicregConfig

OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    "dino": DinoConfig,
    "ibot": IbotConfig,
    "simclr": SimclrConfig,
    "vicreg": VicregConfig,
    "sie": SieConfig,
    "augself": AugSelfConfig,
    "equimod": EquimodConfig,
    "order": OrderConfig,
    "equivariance": EquivarianceConfig,
}
