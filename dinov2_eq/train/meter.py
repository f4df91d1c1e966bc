"""Averages of the numbers that a run logs."""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from dinov2_eq.distributed import all_reduce_sum, get_world_size
from dinov2_eq.types import StepOutput


def effective_rank(features: Tensor) -> Tensor:
    """Counts the directions that features [n, D] fill: exp(entropy) of singular values (RankMe, arXiv 2210.02885).

    The range is [1, min(n, D)]. A collapse of the representation shows here first: the value falls towards 1.
    """
    singular = torch.linalg.svdvals(features.float())
    return torch.special.entr(singular / singular.sum().clamp(min=1e-12)).sum().exp()


def average_over_processes(output: StepOutput) -> StepOutput:
    """Averages losses and metrics of one forward over all processes, detached and in float32; `cls` stays local."""
    numbers = [output.total, *output.losses.values(), *output.metrics.values()]
    means = all_reduce_sum(torch.stack([number.detach().float() for number in numbers])) / get_world_size()
    total, *others = means.unbind()
    losses = dict(zip(output.losses, others, strict=False))
    metrics = dict(zip(output.metrics, others[len(losses) :], strict=True))
    return StepOutput(total, losses, metrics, output.cls)


class StepMeter:
    """Averages losses and metrics since the last `reset`; tensors stay on the device until `summary`."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._steps = self._forwards = self._images = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time spent in the context as waiting for data."""
        asked = time.perf_counter()
        yield
        self._waited += time.perf_counter() - asked

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time spent in the context from the speed: evaluation, pictures, checkpoints."""
        began = time.perf_counter()
        yield
        self._started += time.perf_counter() - began

    def add(self, output: StepOutput, num_images: int) -> None:
        """Adds one forward of `num_images` images; `output` comes from `average_over_processes`."""
        self._sums["total_loss"] += output.total
        for name, loss in output.losses.items():
            self._sums[f"loss/{name}"] += loss
        for name, value in output.metrics.items():
            self._sums[name] += value
        self._cls = output.cls
        self._forwards += 1
        self._images += num_images

    def end_step(self, grad_norms: Mapping[str, Tensor]) -> None:
        self._grad_norms = grad_norms
        self._steps += 1

    def summary(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        values = {name: float(total) / self._forwards for name, total in self._sums.items()}
        values["feature_rank"] = float(effective_rank(self._cls))
        values |= {f"grad_norm/{name}": float(norm) for name, norm in self._grad_norms.items()}
        values["data_wait_share"] = self._waited / seconds
        values["images_per_second"] = self._images / seconds
        return values

    def line(self, values: Mapping[str, float], done: int, steps: int) -> str:
        """Formats the log line after `done` of `steps` steps."""
        terms = "  ".join(f"{name[5:]} {value:.4f}" for name, value in values.items() if name.startswith("loss/"))
        seconds_per_step = (time.perf_counter() - self._started) / self._steps
        left = (steps - done) * seconds_per_step
        return (
            f"step {done}/{steps}  loss {values['total_loss']:.4f}  {terms}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:.0f} images/s  {left / 60:.1f} min left"
        )
