"""A run stops before a NaN or an infinity reaches its weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dinov2_eq.fsdp import clip_grad_norm
from dinov2_eq.types import StepOutput

ADVICE = (
    "the weights were not updated. Look at the images, lower optim.base_lr or lengthen optim.warmup_steps; the same "
    "command goes on from the newest checkpoint"
)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is NaN or infinite."""


def require_finite(output: StepOutput, step: int) -> None:
    """Raises NonFiniteError with the names of the terms that are NaN or infinite.

    Args:
        output: averaged over the processes, so that all of them stop when one of them meets a NaN.
    """
    values = torch.stack(list(output.losses.values()))
    if not values.isfinite().all():
        terms = dict(zip(output.losses, values.tolist(), strict=True))
        broken = ", ".join(f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value))
        raise NonFiniteError(f"Loss not finite at step {step}: {broken}; {ADVICE}")


def clip_gradients(modules: Mapping[str, nn.Module], clip_grad: float, step: int) -> dict[str, Tensor]:
    """Clips each module's gradient to the norm `clip_grad` (0: not at all); returns the norms before that.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    limit = clip_grad if clip_grad > 0 else float("inf")
    norms = {name: clip_grad_norm(module.parameters(), limit) for name, module in modules.items()}
    if not torch.stack(list(norms.values())).isfinite().all():
        broken = [name for name, norm in norms.items() if not norm.isfinite()]
        raise NonFiniteError(f"The gradient of {', '.join(broken)} is not finite at step {step}; {ADVICE}")
    return norms
