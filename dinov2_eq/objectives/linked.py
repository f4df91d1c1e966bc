"""Base of the objectives that read theta itself: their settings, and the views that theta links.

In the papers two views x and y are compared, and theta leads from x to y. Here y is the second global view, which all
losses of the run see. Where the data are pairs of images, x is the first global view v1. With a transform g, y is
g_theta(u). Then theta does not lead from v1 to y, since v1 is another crop in other colours. So the student encodes u
as a third view, which is x.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum, get_world_size
from dinov2_eq.objectives.base import Context, Needs
from dinov2_eq.objectives.pooling import POOLS, pooled
from dinov2_eq.objectives.transformed import TransformSettings
from dinov2_eq.settings import setting
from dinov2_eq.types import GLOBAL, PATH, PathViews, Scene

DATA = "data"


class Linked(NamedTuple):
    """Representations of the views of this process's images, and what leads from one to another."""

    first: Tensor  # [B, D] of v1
    source: Tensor  # [B, D] of x
    target: Tensor  # [B, D] of y
    theta: Tensor  # [B, A] what leads from x to y; of g, in [-1, 1], of the data, as it is
    known: Tensor  # [B] float32, 1 where theta may be used, else 0


class LinkReader:
    """Reads `Linked` from a scene.

    Args:
        pool: see `pooling.pooled`.
        columns: of theta, the A numbers to use.
        centres, halves: [A] the range of each is centre +- half, which becomes [-1, 1].
    """

    def __init__(self, pool: str, columns: Sequence[int], centres: Sequence[float], halves: Sequence[float]) -> None:
        self.pool = pool
        self.columns = list(columns)
        self.centres = list(centres)
        self.halves = list(halves)

    def __call__(self, scene: Scene) -> Linked:
        student, views = scene.student, scene.views
        first, target = student.invariant(pooled(student.tokens[GLOBAL], self.pool))
        source = first
        if PATH in student.tokens:
            (source,) = student.invariant(pooled(student.tokens[PATH], self.pool))
        theta = views.theta[:, self.columns]
        theta = (theta - theta.new_tensor(self.centres)) / theta.new_tensor(self.halves)
        return Linked(first, source, target, theta, views.known.float())


@dataclass
class LinkedSettings(TransformSettings):
    """Base of the sections of such objectives."""

    transform: str = setting(
        "se2",
        "g: rotation, translation, se2, color_jitter, blur, all (these together), one_of_all, or a registered name; "
        "data: no g, the data are pairs of images with a theta of their own",
    )
    components: list[str] = setting([], "names of the numbers of theta that are used; empty: all of them")
    pool: str = setting(
        "cls", "which vector represents a view: the class token, or the mean patch token", choices=POOLS
    )

    def needs(self) -> Needs:
        if not self.is_built():
            return Needs()
        if self.transform == DATA:
            return Needs(theta=True)
        return Needs(theta=True, pairing=self.pairing(second=1.0), path=PathViews((0.0,), with_base=True))

    def is_built(self) -> bool:
        """Returns whether a loss of this section has a positive weight."""
        return any(weight > 0 for weight in self.weights().values())

    def reader(self, context: Context) -> LinkReader:
        """Returns what reads views and theta; the range of each number of g becomes [-1, 1]."""
        given = context.components
        columns = [given.index(name) for name in self.components or given]
        if self.transform == DATA:
            return LinkReader(self.pool, columns, [0.0] * len(columns), [1.0] * len(columns))
        transform = self.build_transform()
        low, high = transform.low[columns], transform.high[columns]
        halves = torch.where(high > low, (high - low) / 2, 1.0)
        return LinkReader(self.pool, columns, ((low + high) / 2).tolist(), halves.tolist())

    def problems(self, section: str, context: Context) -> Iterator[str]:
        if not (self.components and self.is_built()):
            return  # g is not built without need, since reading a config must not import a user's module
        try:
            given = context.components
        except ValueError:  # reported where g is built
            return
        for name in self.components if given else ():
            if name not in given:
                yield (
                    f"{section}.components={self.components}: theta has no number called {name!r}; it has "
                    f"{', '.join(given)}"
                )

    def cautions(self, section: str, context: Context) -> Iterator[str]:
        if self.transform != DATA and self.is_built():
            yield from super().cautions(section, context)


def mean_of_known(values: Tensor, known: Tensor) -> Tensor:
    """Returns the mean of the values of known pairs, over all processes.

    Each process returns its own part of the mean times the number of processes, so that the average over processes is
    the mean. Without a known pair this is 0, with a gradient of 0.

    Args:
        values: [B], of this process; finite also where theta is unknown.
        known: [B], 1 or 0.
    """
    processes = get_world_size()
    count = all_reduce_sum(known.sum())
    return processes * (values * known).sum() / count.clamp(min=1)
