"""The pieces of one training step: batch to device, checks, clipping, optimizer, and the numbers to log."""

import time
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov2_eq.types import StepOutput


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


def optimize(
    optimizer: torch.optim.Optimizer, modules: Mapping[str, nn.Module], clip_grad: float, step: int
) -> dict[str, Tensor]:
    """Clips each module's gradient to the norm `clip_grad` (0: not at all), then updates the weights.

    Returns:
        The norms before clipping.

    Raises:
        NonFiniteError: a gradient is NaN or infinite; nothing was updated.
    """
    limit = clip_grad if clip_grad > 0 else float("inf")
    norms = {name: nn.utils.clip_grad_norm_(module.parameters(), limit) for name, module in modules.items()}
    broken = [name for name, norm in norms.items() if not torch.isfinite(norm)]
    if broken:
        raise NonFiniteError(
            f"The gradient of {', '.join(broken)} is not finite at step {step}; the weights were not updated. "
            "Lower optim.base_lr, lengthen optim.warmup_steps, or look at the batch; the last checkpoint is good"
        )
    optimizer.step()
    return norms


def effective_rank(features: Tensor) -> Tensor:
    """exp(entropy) of the singular values of features [n, D]: how many directions they fill (RankMe, arXiv 2210.02885).

    A collapse of the representation shows here first: the value falls towards 1.
    """
    singular = torch.linalg.svdvals(features.float())
    return torch.special.entr(singular / singular.sum().clamp(min=1e-12)).sum().exp()


class StepMeter:
    """Averages over the steps since the last `reset`; tensors stay on the device until `summary`."""

    def __init__(self) -> None:
        self.grad_norms: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, Tensor | float] = defaultdict(float)
        self._count = self._images = 0
        self._waited = self._paused = 0.0
        self._started = time.perf_counter()
        self._logged_at: float | None = None

    def resume_clock(self) -> None:
        """Called at the end of each step: evaluation and checkpoints after a log line are not training time."""
        if self._count == 0:
            self._started = time.perf_counter()

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def add(self, output: StepOutput, num_images: int) -> None:
        self._sums["total_loss"] += output.total.detach()
        for name, loss in output.losses.items():
            self._sums[f"loss/{name}"] += loss.detach()
        for name, value in output.metrics.items():
            self._sums[name] += value
        self._teacher_cls = output.teacher_cls
        self._count += 1
        self._images += num_images

    def require_finite(self, output: StepOutput, step: int) -> None:
        """Raises NonFiniteError with the names of the terms that are NaN or infinite, before anything was updated."""
        values = torch.stack([loss.detach().float() for loss in output.losses.values()])
        finite = torch.isfinite(values).tolist()
        if not all(finite):
            broken = [
                f"{name} = {value}"
                for name, value, good in zip(output.losses, values.tolist(), finite, strict=True)
                if not good
            ]
            raise NonFiniteError(
                f"Loss not finite at step {step}: {', '.join(broken)}; the weights were not updated. "
                "Lower optim.base_lr, lengthen optim.warmup_steps, or look at the batch; the last checkpoint is good"
            )

    def summary(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        values = {name: float(total) / self._count for name, total in self._sums.items()}
        values["feature_rank"] = float(effective_rank(self._teacher_cls))
        values |= {f"grad_norm/{name}": float(norm) for name, norm in self.grad_norms.items()}
        values["data_wait_share"] = self._waited / seconds
        values["images_per_second"] = self._images / seconds
        return values

    def line(self, values: Mapping[str, float], done: int, steps: int) -> str:
        """One line for a person."""
        terms = "  ".join(f"{name[5:]} {value:.4f}" for name, value in values.items() if name.startswith("loss/"))
        seconds_per_step = (time.perf_counter() - self._started) / self._count
        left = (steps - done) * seconds_per_step
        return (
            f"step {done}/{steps}  loss {values['total_loss']:.4f}  {terms}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:.0f} images/s  {left / 60:.1f} min left"
        )
