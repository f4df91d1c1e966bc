"""The whole method on one batch: against the plain base method written out by hand, and what gets gradient."""

import pytest
import torch
import torch.nn.functional as F

from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.equivariance.decoders import DECODERS
from dinov2_eq.equivariance.transforms import build_transform
from dinov2_eq.objectives.dino import dino_loss
from dinov2_eq.objectives.ibot import ibot_loss
from dinov2_eq.objectives.koleo import koleo_loss
from dinov2_eq.objectives.targets import centered_softmax
from dinov2_eq.train.build import (
    build_arch,
    build_make_views,
    build_optimizer,
    build_schedules,
    build_train_loader,
)
from dinov2_eq.types import GLOBAL, LOCAL, PATH
from tests.helpers import PAPERS_FORM, tiny_config

CPU = torch.device("cpu")


def one_batch(config):
    batch = next(iter(build_train_loader(config, build_dataset(config.train.dataset_path), 0, 0)))
    return build_make_views(config)(batch)


def forward(config, batch=None):
    arch = build_arch(config, CPU)
    torch.manual_seed(0)
    return arch, arch(batch or one_batch(config), build_schedules(config).at(4))


def gradient_norm(module):
    return sum(parameter.grad.norm() for parameter in module.parameters() if parameter.grad is not None)


def test_a_disabled_task_is_the_plain_base_method():
    """DINO + KoLeo + iBOT as DINOv2 does it, from backbone and head alone."""
    config = tiny_config("equivariance.enabled=false", "student.drop_path_rate=0")
    batch = one_batch(config)
    arch, output = forward(config, batch)
    assert set(arch.trainable_modules()) == {"backbone", "dino_head"} and len(batch.targets) == 0

    student, teacher = (side["backbone"] for side in (arch.student, arch.teacher))
    head, teacher_head = (side["dino_head"] for side in (arch.student, arch.teacher))
    temp, center = build_schedules(config).at(4).teacher_temp, torch.zeros(128)
    seen, targets = [], []
    images, all_masks = batch.groups[GLOBAL].images, batch.groups[GLOBAL].masks
    for view, masks in zip(images, all_masks, strict=True):
        seen.append((student.forward_features(view, masks), teacher.forward_features(view)))
        targets.append(centered_softmax(teacher_head(seen[-1][1]["x_norm_clstoken"]), center, temp))
    logits = [head(ours["x_norm_clstoken"]) for ours, _ in seen]
    logits += [head(student.forward_features(crop)["x_norm_clstoken"]) for crop in batch.groups[LOCAL].images]
    masked = [
        (head(ours["x_norm_patchtokens"][masks]), teacher_head(theirs["x_norm_patchtokens"][masks]))
        for (ours, theirs), masks in zip(seen, all_masks, strict=True)
    ]
    weights = torch.cat([(1 / masks.sum(1).clamp(min=1))[:, None].expand_as(masks)[masks] for masks in all_masks])
    expected = {
        "dino": dino_loss(torch.stack(logits), torch.stack(targets)),
        "koleo": sum(koleo_loss(ours["x_norm_clstoken"]) for ours, _ in seen),
        "ibot": ibot_loss(
            torch.cat([ours for ours, _ in masked]),
            centered_softmax(torch.cat([theirs for _, theirs in masked]), center, temp),
            weights,
            num_crops=2 * all_masks.shape[1],
        ),
    }
    torch.testing.assert_close(output.losses, expected)
    torch.testing.assert_close(output.total, expected["dino"] + 0.1 * expected["koleo"] + expected["ibot"])


def test_task_on_gives_gradient_to_decoders_projection_and_backbone():
    arch, output = forward(tiny_config())
    assert set(output.losses) == {"dino", "koleo", "ibot", "reconstruction"}
    output.losses["reconstruction"].backward()
    for name in ("backbone", "projection", "reconstruction"):
        assert gradient_norm(arch.trainable_modules()[name]) > 0, name
    assert gradient_norm(arch.student["dino_head"]) == 0
    assert gradient_norm(arch.teacher) == 0


def test_base_losses_and_decoders_read_different_halves():
    for term, touched, spared in (("reconstruction", "equivariant", "invariant"), ("dino", "invariant", "equivariant")):
        arch, output = forward(tiny_config(*PAPERS_FORM))
        output.losses[term].backward()
        projection = arch.student["projection"]
        assert gradient_norm(getattr(projection, touched)) > 0
        assert gradient_norm(getattr(projection, spared)) == 0


def test_the_control_transforms_and_splits_but_rebuilds_nothing():
    config = tiny_config(*PAPERS_FORM, "equivariance.loss_weight=0")
    batch, task_batch = one_batch(config), one_batch(tiny_config(*PAPERS_FORM))
    arch, output = forward(config)
    assert set(output.losses) == {"dino", "koleo", "ibot"} and "projection" in arch.trainable_modules()
    torch.testing.assert_close(batch.groups[GLOBAL].images, task_batch.groups[GLOBAL].images)
    assert len(batch.targets) == 0 and len(task_batch.targets) == 2


@pytest.mark.parametrize("form", [[], PAPERS_FORM])
def test_runs_with_and_without_the_task_begin_equal(form):
    """Same seed, same backbone weights, same crops, same masks but for the views that decoders of a third view read."""
    task, plain = tiny_config(*form), tiny_config("equivariance.enabled=false")
    (task_arch, _), (plain_arch, _) = forward(task), forward(plain)
    torch.testing.assert_close(task_arch.student["backbone"].state_dict(), plain_arch.student["backbone"].state_dict())
    task_batch, plain_batch = one_batch(task), one_batch(plain)
    assert torch.equal(task_batch.groups[GLOBAL].images[0], plain_batch.groups[GLOBAL].images[0])
    assert torch.equal(task_batch.groups[LOCAL].images, plain_batch.groups[LOCAL].images)
    masks, plain_masks = (batch.groups[GLOBAL].masks for batch in (task_batch, plain_batch))
    if form:
        assert torch.equal(masks, plain_masks)
    else:
        assert masks.any() and not masks[1, task_batch.path_rows].any()


def test_the_third_view_is_for_the_decoders_alone():
    """The base losses see v1 and u; u and g(u) of half of the images go to the decoders."""
    third = ["equivariance.third_view_share=0.5", "student.drop_path_rate=0"]
    config = tiny_config(*third, "equivariance.border=zeros")
    views, still = one_batch(config), one_batch(tiny_config("equivariance.enabled=false"))
    assert torch.equal(views.groups[GLOBAL].images, still.groups[GLOBAL].images)
    transformed = one_batch(tiny_config("equivariance.view=second", "equivariance.border=zeros"))
    rows = views.path_rows
    assert rows.tolist() == [1, 3]
    torch.testing.assert_close(views.groups[PATH].images[0], transformed.groups[GLOBAL].images[1, rows])

    arch, output = forward(config, views)
    backbone, split = arch.student["backbone"], arch.student["projection"]
    ours, theirs = (
        split.equivariant(backbone.forward_features(images)["x_norm_patchtokens"])
        for images in (views.groups[GLOBAL].images[1, rows], views.groups[PATH].images[0])
    )
    rebuilt = torch.stack([decoder(ours, theirs, (4, 4)) for decoder in arch.objectives["reconstruction"].decoders])
    torch.testing.assert_close(views.targets, transformed.targets[:, rows])
    expected = (rebuilt - views.targets).square().mean()
    torch.testing.assert_close(output.losses["reconstruction"], expected)
    control = one_batch(tiny_config(*third, "equivariance.loss_weight=0"))
    assert PATH not in control.groups and len(control.targets) == 0


def test_with_whole_tokens_the_control_of_a_third_view_is_the_plain_method():
    _, control = forward(tiny_config("equivariance.border=zeros", "equivariance.loss_weight=0"))
    _, plain = forward(tiny_config("equivariance.enabled=false"))
    assert control.losses == plain.losses and control.total == plain.total
    arch, task = forward(tiny_config("equivariance.border=zeros"))
    task.losses["reconstruction"].backward()
    assert gradient_norm(arch.student["backbone"]) > 0 and gradient_norm(arch.student["projection"]) > 0


def test_a_third_view_of_local_size():
    """The decoders read, and rebuild, u and g(u) shrunk to the size of a local crop."""
    third = ["equivariance.border=zeros", "student.drop_path_rate=0"]
    config = tiny_config(*third, "equivariance.third_view_size=local")
    views, whole = one_batch(config), one_batch(tiny_config(*third))
    u, moved = views.groups[PATH].images
    side = config.crops.local_crops_size
    shrunk = F.interpolate(whole.groups[GLOBAL].images[1, views.path_rows], (side, side), mode="area")
    assert u.shape[-1] == side == views.targets.shape[-1]
    assert (u - shrunk).abs().mean() < 0.2 * (u - moved).abs().mean()
    arch, output = forward(config, views)
    backbone, split = arch.student["backbone"], arch.student["projection"]
    tokens = [split.equivariant(backbone.forward_features(images)["x_norm_patchtokens"]) for images in (u, moved)]
    grid = (side // config.student.patch_size,) * 2
    rebuilt = torch.stack([decoder(*tokens, grid) for decoder in arch.objectives["reconstruction"].decoders])
    torch.testing.assert_close(output.losses["reconstruction"], (rebuilt - views.targets).square().mean())


@pytest.mark.parametrize("num_intermediates", [1, 2, 3])
@pytest.mark.parametrize("decoder", DECODERS)
def test_any_number_of_intermediates(num_intermediates, decoder):
    config = tiny_config(f"equivariance.num_intermediates={num_intermediates}", f"equivariance.decoder={decoder}")
    arch, output = forward(config)
    assert len(arch.objectives["reconstruction"].decoders) == num_intermediates
    assert torch.isfinite(output.losses["reconstruction"])


@pytest.mark.parametrize("transform", ["rotation", "translation", "se2", "color_jitter", "blur"])
@pytest.mark.parametrize("border", ["zeros", "canvas"])
def test_every_transform_and_border(transform, border):
    """The second view and the targets are what the transform makes of the base view; black comes in with zeros only."""
    overrides = ["equivariance.view=second", f"equivariance.transform={transform}", f"equivariance.border={border}"]
    config = tiny_config(*overrides)
    batch = next(iter(build_train_loader(config, build_dataset(config.train.dataset_path), 0, 0)))
    views = build_make_views(config)(batch)
    g = build_transform(transform)
    assert batch.base_canvases.shape[-2:] == (g.canvas_size((32, 32)) if border == "canvas" else (32, 32))
    still = build_make_views(config)(batch._replace(theta=torch.zeros_like(batch.theta)))
    third = build_make_views(config)(batch._replace(theta=g.scaled(batch.theta, 1 / 3)))
    torch.testing.assert_close(views.targets[0], third.groups[GLOBAL].images[1])
    assert (views.groups[GLOBAL].images[1] - still.groups[GLOBAL].images[1]).abs().mean() > 1e-3
    _, output = forward(config, views)
    assert torch.isfinite(output.total)


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        (["ibot.separate_head=true", "ibot.head_n_prototypes=64"], {"dino_head", "ibot_head"}),
        (["ibot.loss_weight=0"], {"dino_head"}),
        (["dino.loss_weight=0"], {"dino_head"}),
        (["dino.loss_weight=0", "ibot.separate_head=true", "ibot.head_n_prototypes=64"], {"ibot_head"}),
        (["train.centering=sinkhorn_knopp", "crops.local_crops_number=0"], {"dino_head"}),
    ],
)
def test_recipes(overrides, heads):
    arch, output = forward(tiny_config(*overrides))
    assert set(arch.student) - {"backbone", "projection"} == heads
    output.total.backward()
    for name, module in arch.trainable_modules().items():
        assert gradient_norm(module) > 0, name


def test_teacher_starts_equal_and_follows():
    arch, _output = forward(tiny_config())
    before = {name: tensor.clone() for name, tensor in arch.teacher.state_dict().items()}
    torch.testing.assert_close(before, dict(arch.student.state_dict()))
    with torch.no_grad():
        for parameter in arch.student.parameters():
            parameter.add_(1.0)
    arch.end_step(0.9)
    for name, tensor in arch.teacher.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + 0.1)


def test_the_teacher_never_trains():
    arch, _ = forward(tiny_config())
    arch.eval()
    assert arch.train() is arch and arch.student.training and not arch.teacher.training
    optimized = {
        id(parameter) for group in build_optimizer(tiny_config(), arch).param_groups for parameter in group["params"]
    }
    assert not optimized & {id(parameter) for parameter in arch.teacher.parameters()}
    assert optimized == {id(p) for module in arch.trainable_modules().values() for p in module.parameters()}


def test_teacher_names_are_those_of_dinov2():
    arch, _ = forward(tiny_config("ibot.separate_head=true"))
    prefixes = {name.split(".")[0] for name in arch.teacher.state_dict()}
    assert prefixes == {"backbone", "projection", "dino_head", "ibot_head"}
