"""Stops a run before NaN or infinity reaches its weights."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dinov2_eq.fsdp import clip_grad_norm
from dinov2_eq.types import StepOutput

ADVICE = (
    "the weights were not updated. Check the images, lower optim.base_lr or lengthen optim.warmup_steps; rerun the "
    "same command to resume from the newest checkpoint"
)


class NonFiniteError(FloatingPointError):
    """Raised when a loss or a gradient is NaN or infinite."""


def require_finite(outputs: Sequence[StepOutput], step: int) -> None:
    """Checks that the losses of all forwards of a step are finite; synchronises with the device once.

    Args:
        outputs: averaged over the processes, so that a NaN in one process stops all of them.

    Raises:
        NonFiniteError: a loss is NaN or infinite; the message names it.
    """
    values = torch.stack([torch.stack(list(output.losses.values())) for output in outputs])  # [forwards, terms]
    if values.isfinite().all():
        return
    for losses in values.tolist():
        terms = dict(zip(outputs[0].losses, losses, strict=True))
        if broken := ", ".join(f"{name} = {value}" for name, value in terms.items() if not math.isfinite(value)):
            raise NonFiniteError(f"Loss not finite at step {step}: {broken}; {ADVICE}")


def clip_gradients(modules: Mapping[str, nn.Module], clip_grad: float, per: str, step: int) -> dict[str, Tensor]:
    """Clips gradients in place.

    Args:
        clip_grad: largest norm; 0: no clipping.
        per: "module": clip the norm of each module (DINOv2); "tensor": that of each parameter (DINO, iBOT).

    Returns:
        The gradient norm of each module before clipping, by name.

    Raises:
        NonFiniteError: a gradient is NaN or infinite.
    """
    limit = clip_grad if clip_grad > 0 else float("inf")
    if per == "tensor":
        norms = {name: clip_grad_norm(module.parameters(), float("inf")) for name, module in modules.items()}
        for module in modules.values():
            for parameter in module.parameters():
                clip_grad_norm([parameter], limit)
    else:
        norms = {name: clip_grad_norm(module.parameters(), limit) for name, module in modules.items()}
    if not torch.stack(list(norms.values())).isfinite().all():
        broken = [name for name, norm in norms.items() if not norm.isfinite()]
        raise NonFiniteError(f"The gradient of {', '.join(broken)} is not finite at step {step}; {ADVICE}")
    return norms
