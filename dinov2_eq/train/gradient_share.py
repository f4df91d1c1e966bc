"""How hard one objective pulls on the student, fixed as a share of the gradient."""

from functools import partial

import torch
from torch import Tensor, nn

from dinov2_eq.distributed import all_reduce_sum
from dinov2_eq.types import CropTokens, NetworkOutput


class GradientShare(nn.Module):
    """Scales one objective's gradient on the student's tokens to a share of the whole.

    own, rest = norms of the gradients on all tokens: this objective's, all others'      # moving averages over steps
    own_gradient *= share / (1 - share) * rest / own

    A loss weight says how much a loss counts. How hard that pulls on the student also depends on the other losses, and
    it changes as they fall. With a share the pull stays, whatever the base method is.

    Only what flows back into the tokens is scaled: the objective's own modules and its projection get the whole
    gradient. The first step measures, and scales by 0. The norms run over the images of all processes and forwards of a
    step.

    Args:
        start: share at the first step, in (0, 1).
        end: share at the last step, in (0, 1); it moves linearly.
        momentum: of the moving averages.
    """

    def __init__(self, start: float, end: float, momentum: float = 0.9) -> None:
        super().__init__()
        self.start, self.end, self.momentum = start, end, momentum
        self.register_buffer("squares", torch.zeros(2))  # moving averages of the squared norms: rest, own
        self.register_buffer("step_squares", torch.zeros(2), persistent=False)

    def factor(self, progress: float) -> Tensor:
        """Returns what the own gradient is scaled by, after a share `progress` of the steps."""
        share = self.start + (self.end - self.start) * progress
        rest, own = self.squares.sqrt()
        return torch.where(own > 0, share / (1 - share) * rest / own, 0.0)

    def measured(self, output: NetworkOutput, factor: Tensor | None = None) -> NetworkOutput:
        """Returns the same tokens, with a measure of the gradient that flows back into them.

        Args:
            output: tokens of the student.
            factor: scales the gradient of the own objective; None: `output` is for the other objectives.
        """
        branches = {
            name: CropTokens(*(self._branch(values, factor) for values in tokens))
            for name, tokens in output.tokens.items()
        }
        return output._replace(tokens=branches)

    def _branch(self, tokens: Tensor, factor: Tensor | None) -> Tensor:
        branch = tokens.view_as(tokens)
        if branch.requires_grad:
            branch.register_hook(partial(self._record, factor))
        return branch

    def _record(self, factor: Tensor | None, gradient: Tensor) -> Tensor | None:
        self.step_squares[0 if factor is None else 1] += gradient.float().square().sum()
        return None if factor is None else gradient * factor.to(gradient.dtype)

    def end_step(self) -> None:
        """Moves the averages by the gradients since the last call; call it once after each update."""
        self.squares.lerp_(all_reduce_sum(self.step_squares), 1 - self.momentum)
        self.step_squares.zero_()
