"""Small scenes with random tokens, for tests of objectives."""

import torch
from torch import nn

from dinov2_eq.equivariance.split import NoSplit
from dinov2_eq.types import GLOBAL, LOCAL, CropTokens, Group, NetworkOutput, Scene, ViewBatch


def make_side(seed, num_local=0, batch=3, patches=4, dim=8, **heads):
    """Tokens of two global and some local views as one network would give them."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(views):
        cls = torch.randn(views, batch, dim, generator=generator)
        return CropTokens(cls.requires_grad_(), torch.randn(views, batch, patches, dim, generator=generator))

    groups = {GLOBAL: tokens(2)} | ({LOCAL: tokens(num_local)} if num_local else {})
    return NetworkOutput(groups, nn.ModuleDict({"projection": NoSplit(), **heads}))


def make_scene(student, teacher=None, masks=None, targets=None, teacher_temp=0.05):
    """A scene of images of 8 x 8 pixels."""
    batch = student.tokens[GLOBAL].cls.shape[1]
    masked = None if masks is None else masks.flatten().nonzero().flatten()
    views = ViewBatch(
        groups={GLOBAL: Group(torch.zeros(2, batch, 3, 8, 8), masks, masked)},
        theta=torch.zeros(batch, 0),
        known=torch.zeros(batch, dtype=torch.bool),
        targets=torch.zeros(0, batch, 3, 8, 8) if targets is None else targets,
        path_rows=torch.zeros(0, dtype=torch.long),
    )
    return Scene(views, student, teacher, teacher_temp)
