"""Base classes of the loss terms (objectives) and of their settings.

An objective owns its settings, its loss and the modules that only it uses. It declares what it needs; data, networks
and schedules provide exactly that.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from torch import nn

from dinov2_eq.equivariance.pairing import Pairing
from dinov2_eq.types import PathViews, Scene, Term


@dataclass(frozen=True)
class MaskNeed:
    """Patches that the student does not see; see `data.masking.BlockMasking`."""

    ratio_min_max: tuple[float, float]  # range of the share of patches that a mask hides
    sample_probability: float  # share of the global views that get a mask


@dataclass(frozen=True)
class Needs:
    """What an objective needs in its `Scene`; by default, only the two global views."""

    teacher: bool = False
    heads: Mapping[str, str] = field(default_factory=dict)  # module name -> section whose `build_head` makes it
    local_crops: bool = False
    masks: MaskNeed | None = None
    pairing: Callable[[], Pairing] | None = None  # builds the rule by which g makes the second view; None: no g
    theta: bool = False  # reads theta, whether g or the data set of pairs gives it; see `Context.components`
    split: tuple[int | None, int] | None = None  # channels of a token's invariant part (None: all) and equivariant part
    targets: tuple[float, ...] = ()  # fractions of theta at which pixels are compared
    shown: tuple[float, ...] = ()  # fractions of theta in pictures of the run, also of a control run
    path: PathViews | None = None  # views that the student encodes beside the global and local crops


REMEDY = "set the loss_weight of one of them to 0"
REMEDIES = {
    "pairing": "give both sections the same transform, border and ranges, with equivariance.view=second, or switch one "
    "of them off (loss_weight=0, equivariance.enabled=false)"
}


def union(needs: Mapping[str, Needs]) -> Needs:
    """Joins the needs of several objectives, given by name of their section.

    Raises:
        ValueError: two of them need different things of one kind, such as two kinds of masks.
    """
    heads = {name: section for need in needs.values() for name, section in need.heads.items()}
    joined: dict[str, Any] = {"heads": heads}
    for each in fields(Needs):
        wanted = {name: getattr(need, each.name) for name, need in needs.items() if getattr(need, each.name)}
        if each.name == "heads" or not wanted:
            continue
        first, *others = wanted.values()
        if any(other != first for other in others):
            names = " and ".join(wanted)
            raise ValueError(f"{names} need different {each.name}; {REMEDIES.get(each.name, REMEDY)}")
        joined[each.name] = first
    return Needs(**joined)


class Context(NamedTuple):
    """Values that an objective may depend on, from other sections of the config."""

    sections: Mapping[str, "ObjectiveSettings"]  # of all objectives, since one may share the head of another
    crop_sizes: Mapping[str, int]  # side in pixels of a "global" and of a "local" crop
    patch_size: int  # pixels
    grid: tuple[int, int]  # patches of a global view
    batch_size: int  # images in one forward of one process
    step_images: int  # images of one process in one optimizer step
    attention: str  # see `layers.attention.choose_backend`
    centering: str  # see `objectives.targets.build_targets`
    seed: int
    pairing: Callable[[], Pairing]  # builds what makes the second view

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the parameters in theta, not empty for an objective that needs theta; raises ValueError as g."""
        return self.pairing().components


class Objective(nn.Module, ABC):
    """One loss term and the modules that only it uses (decoders, projectors, centres), which train with the student."""

    @abstractmethod
    def forward(self, scene: Scene) -> Term:
        """Returns the unweighted loss of a batch."""

    def end_step(self) -> None:
        """Runs once after every optimizer step, however many forwards that step accumulated."""

    def pictures(self, scene: Scene) -> dict[str, Any]:
        """Returns images to show, normalised [..., 3, H, W] by name, such as reconstructions."""
        return {}


class ObjectiveSettings(ABC):
    """Base of a method's config section: a dataclass of `setting`s, which also builds the objectives.

    A section has one loss, or several that share it (DINO and KoLeo in DINOv2's "dino").
    """

    @abstractmethod
    def weights(self) -> dict[str, float]:
        """Returns the weight of each loss of this section by name; a loss of weight 0 is not built."""

    def gradient_shares(self) -> dict[str, tuple[float, float]]:
        """Returns the share of the gradient at the first and the last step, for each loss that has a fixed one."""
        return {}

    @abstractmethod
    def needs(self) -> Needs:
        """Returns the needs of the losses with positive weight, and those the section has even without them."""

    @abstractmethod
    def build(self, loss: str, context: Context, dim: int) -> Objective:
        """Builds the objective of one of the losses; `dim` is the number of invariant channels of a token."""

    def is_used(self) -> bool:
        """Returns whether the section has any effect; if not, its values are not checked."""
        return True

    def problems(self, section: str, context: Context) -> Iterator[str]:
        """Yields a message with key, value and remedy for each combination that cannot run."""
        yield from ()

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        """Yields a message with value and remedy for each setting that can run but trains nothing useful."""
        yield from ()


def caution_of_single_images(section: str, context: Context, consequence: str) -> Iterator[str]:
    """Yields a caution if a forward has one image, for a loss that compares the images of a forward.

    Args:
        consequence: what that does to the loss.
    """
    if context.batch_size == 1:
        yield (
            f"{section}: with train.batch_size_per_gpu=1 {consequence}. Increase it; train.accumulation_steps does not "
            "help, as forwards do not see each other"
        )
