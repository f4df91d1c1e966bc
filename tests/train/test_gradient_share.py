"""The task's gradient as a share of the whole, against gradients taken one by one."""

import pytest
import torch

from dinov2_eq.config.load import load_config
from dinov2_eq.train.build import build_arch, build_schedules
from dinov2_eq.train.gradient_share import GradientShare
from dinov2_eq.types import GLOBAL, CropTokens, NetworkOutput
from tests.helpers import tiny_config
from tests.train.test_ssl_meta_arch import CPU, one_batch


def output_of(*tokens):
    return NetworkOutput({GLOBAL: CropTokens(*tokens)}, modules=torch.nn.ModuleDict())


def test_against_norms_written_out():
    torch.manual_seed(0)
    cls, patches = torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 5, 4, requires_grad=True)
    share, rest, own = GradientShare(0.25, 0.25), [], []
    for step in range(3):
        wanted_rest, wanted_own = torch.randn(2, 3, 4), torch.randn(2, 3, 5, 4)
        factor = share.factor(0.5)
        theirs, ours = share.measured(output_of(cls, patches)), share.measured(output_of(cls, patches), factor)
        loss = (theirs.tokens[GLOBAL].cls * wanted_rest).sum() + (ours.tokens[GLOBAL].patches * wanted_own).sum()
        to_cls, to_patches = torch.autograd.grad(loss, [cls, patches])
        torch.testing.assert_close(to_cls, wanted_rest)
        weights = torch.tensor([0.9 ** (step - 1 - past) for past in range(step)])
        expected = 0.0
        if step:
            mean = [(weights * torch.tensor(squares)).sum().sqrt() for squares in (rest, own)]
            expected = 0.25 / 0.75 * mean[0] / mean[1]
        torch.testing.assert_close(to_patches, expected * wanted_own)
        rest.append(wanted_rest.square().sum().item())
        own.append(wanted_own.square().sum().item())
        share.end_step()


def test_the_share_moves_linearly():
    share = GradientShare(0.5, 0.2)
    share.squares.fill_(1.0)
    factors = [share.factor(progress).item() for progress in (0.0, 0.5, 1.0)]
    assert factors == pytest.approx([0.5 / 0.5, 0.35 / 0.65, 0.2 / 0.8])


@pytest.mark.parametrize("view", ["second", "third"])
def test_tokens_get_the_wanted_share(view):
    """With DINO and iBOT, whatever the loss weight is: the same batch twice, so the averages are exact."""
    gradients = []
    for weight in (1, 50):
        config = tiny_config(f"equivariance.view={view}", "equivariance.gradient_share=0.3", "ibot.loss_weight=1")
        config.equivariance.loss_weight = weight
        batch, arch, scheduled = one_batch(config), build_arch(config, CPU), build_schedules(config).at(4)
        first = backbone_gradient(arch, batch, scheduled)
        torch.testing.assert_close(first, backbone_gradient(build_arch(config, CPU), batch, scheduled, plain=True))
        arch.shares["reconstruction"].end_step()
        gradients.append(backbone_gradient(arch, batch, scheduled))
        rest, own = token_norms(arch, batch, scheduled)
        assert own / (own + rest) == pytest.approx(0.3, rel=1e-4)
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def backbone_gradient(arch, batch, scheduled, *, plain=False):
    arch.zero_grad()
    torch.manual_seed(0)
    output = arch(batch, scheduled)
    total = (
        output.total - arch.loss_weights["reconstruction"] * output.losses["reconstruction"] if plain else output.total
    )
    total.backward()
    return torch.cat([parameter.grad.flatten() for parameter in arch.student["backbone"].parameters()])


def token_norms(arch, batch, scheduled):
    """Norms of the gradients that the student's tokens get from the other losses and from the task."""
    torch.manual_seed(0)
    scene = arch.encode(batch, scheduled)
    arch.encode = lambda *_: scene
    output = arch(batch, scheduled)
    tokens = [values for name in scene.student.tokens for values in scene.student.tokens[name]]
    own = arch.loss_weights["reconstruction"] * output.losses["reconstruction"]
    norms = []
    for loss in (output.total - own, own):
        found = torch.autograd.grad(loss, tokens, retain_graph=True, allow_unused=True)
        norms.append(sum(gradient.square().sum() for gradient in found if gradient is not None).sqrt().item())
    return norms


def test_a_last_share_needs_a_first():
    with pytest.raises(ValueError, match=r"gradient_share_end=0\.1 needs equivariance\.gradient_share"):
        load_config("debug", ["equivariance.gradient_share_end=0.1"])
