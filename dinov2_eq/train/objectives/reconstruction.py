"""The equivariance task: rebuild the K images between u and v2 from the equivariant tokens of v1 and v2."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2_eq.equivariance.reconstruction_loss import reconstruction_loss
from dinov2_eq.train.objectives.base import Objective
from dinov2_eq.types import NetworkOutput, Term, ViewBatch


class ReconstructionObjective(Objective):
    def __init__(self, decoders: Sequence[nn.Module], patch_size: int) -> None:
        """One independent decoder for each of the K intermediate targets."""
        super().__init__()
        self.decoders = nn.ModuleList(decoders)
        self.patch_size = patch_size

    def reconstruct(self, student: NetworkOutput, size: tuple[int, int]) -> Tensor:
        """u_hat_k for k = 1..K: [K, B, 3, H, W] in normalised pixel values."""
        anchor, transformed = student.equivariant(student.global_crops.patches)  # each [B, N, D_equi]
        grid = (size[0] // self.patch_size, size[1] // self.patch_size)
        return torch.stack([decoder(anchor, transformed, grid) for decoder in self.decoders])

    def forward(self, student: NetworkOutput, teacher: NetworkOutput, batch: ViewBatch, teacher_temp: float) -> Term:
        predicted = self.reconstruct(student, batch.global_crops.shape[-2:])
        return Term(reconstruction_loss(predicted, batch.intermediate_targets), {})
