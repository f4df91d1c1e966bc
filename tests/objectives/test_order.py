"""The order loss on triplets made by hand, against a slow loop, its gradients, and two processes against one."""

import json

import pytest
import torch

from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import build_dataset
from dinov2_eq.equivariance.transforms import Transform, TransformRanges, build_transform
from dinov2_eq.objectives.order import FRACTIONS, Order, order_loss
from dinov2_eq.probes.order import feature_distances
from dinov2_eq.train.build import build_make_views, build_train_loader
from dinov2_eq.train.cautions import cautions
from dinov2_eq.types import GLOBAL, PATH, CropTokens
from tests.helpers import TINY, in_this_process
from tests.objectives.scenes import make_scene, make_side
from tests.objectives.test_simclr import in_a_group
from tests.processes import run_ranks

NO_DINOV2 = ["dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0", "equivariance.enabled=false"]
SIMCLR = [*NO_DINOV2, "simclr.loss_weight=1", "simclr.projector_hidden_dim=32"]
ORDER = [*SIMCLR, "order.loss_weight=1", "order.transform=rotation"]
ONE = torch.ones(1)
KNOWN = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.1, 0.2, 0.3], 0),  # in order, by the margin or more
        ([0.0, 0.0, 0.0], (0.05 + 0.05 + 0.1) / 3),  # invariant: the margins are missing
        ([0.3, 0.2, 0.1], (0.15 + 0.15 + 0.3) / 3),  # the wrong way round
        ([0.1, 0.1, 0.3], 0.05 / 3),  # the two weak ones are equal
    ],
)
def test_triplets_made_by_hand(distances, expected):
    strengths = torch.tensor([[0.25], [0.5], [0.75]])
    loss = order_loss(torch.tensor(distances)[:, None], strengths, ONE, margin=0.2)
    assert loss.item() == pytest.approx(expected)


def numbers(images=6):
    generator = torch.Generator().manual_seed(0)
    strengths = torch.rand(3, images, generator=generator).sort(dim=0).values
    return torch.rand(3, images, generator=generator) / 4, strengths


def slow_loss(distances, strengths, known, margin):
    total = number = 0
    for image in range(distances.shape[1]):
        for a in range(3):
            for b in range(a + 1, 3):
                gap = margin * (strengths[b, image] - strengths[a, image])
                total += known[image] * max(0, distances[a, image] + gap - distances[b, image])
        number += known[image]
    return total / (3 * number)


@pytest.mark.parametrize("known", [KNOWN, torch.ones(6)])
def test_against_a_loop(known):
    torch.testing.assert_close(order_loss(*numbers(), known, 0.5), slow_loss(*numbers(), known, 0.5))


def test_the_gradient_brings_the_weak_near_and_takes_the_strong_away():
    distances = torch.tensor([[0.3], [0.2], [0.1]], requires_grad=True)
    order_loss(distances, torch.tensor([[0.25], [0.5], [0.75]]), ONE, 0.2).backward()
    weak, middle, strong = distances.grad.flatten().tolist()
    assert weak > 0 > strong and middle == 0


def test_descent_puts_features_in_order():
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    changed = (base + 0.3 * torch.randn(3, 8, 6, generator=generator)).requires_grad_()
    strengths = torch.tensor(FRACTIONS)[:, None].expand(3, 8)
    optimizer = torch.optim.Adam([changed], lr=0.02)
    for _ in range(200):
        loss = order_loss(feature_distances(base, changed), strengths, torch.ones(8), 0.2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    gaps = feature_distances(base, changed).detach().diff(dim=0)
    assert loss < 1e-3 and (gaps > 0.2 / 3 - 0.01).all()


def order_scene():
    """Three images; the path is that of the last and the first, the first one's theta is unknown."""
    student = make_side(0)
    path = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    student.tokens[PATH] = CropTokens(path, path[:, :, None].expand(3, 2, 4, 8))
    scene = make_scene(student)
    views = scene.views._replace(
        theta=torch.tensor([[10.0], [20.0], [-30.0]]),
        known=torch.tensor([False, True, True]),
        path_rows=torch.tensor([2, 0]),
    )
    return scene._replace(views=views)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_objective_reads_u_and_its_path_where_theta_is_known(pool):
    scene = order_scene()
    tokens, rotation = scene.student.tokens, build_transform("rotation", max_angle_deg=45.0)
    term = Order(rotation, 0.5, pool)(scene)
    u = tokens[GLOBAL].cls[1, 2] if pool == "cls" else tokens[GLOBAL].patches[1, 2].mean(0)
    distances = feature_distances(u[None], tokens[PATH].cls[:, :1])
    strengths = 30 / 45 * torch.tensor(FRACTIONS)[:, None]
    torch.testing.assert_close(term.loss, order_loss(distances, strengths, ONE, 0.5))
    order = [distances[a] < distances[b] for a, b in ((0, 1), (0, 2), (1, 2))]
    assert term.metrics["order_accuracy"].item() == pytest.approx(sum(order).item() / 3)
    term.loss.backward()
    gradient = tokens[PATH].cls.grad
    assert gradient[:, 0].abs().sum() > 0 and gradient[:, 1].abs().sum() == 0


def test_strength_is_the_largest_share_of_a_range():
    transform = build_transform("all", max_angle_deg=40.0, max_shift=0.0, max_hue=0.1)
    theta = torch.zeros(3, len(transform.components))
    theta[0, 0] = -10.0  # degrees
    theta[1, transform.components.index("hue")] = 0.05
    theta[1, transform.components.index("blur_sigma")] = 1.6  # of 2 pixels
    torch.testing.assert_close(transform.strength(theta), torch.tensor([0.25, 0.8, 0.0]))
    drawn = transform.sample(500, torch.Generator().manual_seed(0))
    strength = transform.strength(drawn)
    assert ((strength > 0) & (strength <= 1)).all()
    torch.testing.assert_close(transform.strength(transform.scaled(drawn, 1 / 3)), strength / 3)


def gradient_of_a_share():
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    distances, strengths = numbers()
    own = slice(rank * 6 // world, (rank + 1) * 6 // world)
    leaf = distances[:, own].clone().requires_grad_()
    (order_loss(leaf, strengths[:, own], KNOWN[own], 0.5) / world).backward()  # gradients are averaged over processes
    return leaf.grad.numpy()


def test_two_processes_equal_one():
    distances, strengths = numbers()
    order_loss(distances.requires_grad_(), strengths, KNOWN, 0.5).backward()
    shares = run_ranks(in_a_group, 2, gradient_of_a_share)
    found = torch.cat([torch.from_numpy(share) for share in shares], dim=1)
    assert (found - distances.grad).norm() < 1e-6 * distances.grad.norm()


def test_the_path_is_g_at_three_fractions_of_theta_on_u():
    config = load_config("debug", [*TINY, *ORDER, "order.share=0.5", "order.border=zeros"])
    batch = next(iter(build_train_loader(config, build_dataset("Shapes:size=40"), 0, 0)))
    views = build_make_views(config)(batch._replace(theta=torch.full_like(batch.theta, 90.0)))
    images, rows = views.groups[PATH].images, views.path_rows
    assert len(images) == 3 and 0 < len(rows) < len(batch.theta)
    u, inside = views.groups[GLOBAL].images[1, rows], slice(8, 24)
    turned = u.rot90(1, (-2, -1))[..., inside, inside]
    torch.testing.assert_close(images[2][..., inside, inside], turned, atol=1e-3, rtol=0)
    assert not torch.allclose(images[0], images[2], atol=0.1)


class NoScale(Transform):
    """A transform without parameters."""

    components = ()

    def __init__(self, ranges: TransformRanges) -> None:
        super().__init__([], [])

    def apply(self, images, theta, size):
        return images


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["order.max_angle_deg=0"], r"order.transform=rotation changes nothing \(the range of angle_deg is 0\)"),
        (
            ["order.transform=tests.objectives.test_order:NoScale"],
            r"changes nothing \(the range of no parameter is 0\)",
        ),
        (["order.margin=0"], r"order.margin=0.0 must lie in \(0, 2\]"),
        (["order.share=0"], r"order.share=0.0 must lie in \(0, 1\]"),
        (["order.pool=max"], "order.pool"),
        (
            ["equivariance.enabled=true", "equivariance.transform=rotation"],
            "order and equivariance need different path; set the loss_weight of one of them to 0",
        ),
    ],
)
def test_what_cannot_run_says_so(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_config("debug", [*ORDER, *overrides])


def test_an_unknown_transform_ends_with_a_sentence(tmp_path, capsys):
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path), *TINY, *ORDER]
    assert in_this_process([*words, "order.transform=rotaton"]) == 2
    assert "Did you mean 'rotation'" in capsys.readouterr().err


def test_switched_off_it_changes_nothing():
    config = load_config("debug", [*SIMCLR, "order.transform=no such", "order.max_angle_deg=0"])
    assert config.needs() == load_config("debug", SIMCLR).needs() and not cautions(config)


def test_alone_it_is_cautioned():
    alone = [*NO_DINOV2, "order.loss_weight=1"]
    assert any("order is the only loss" in sentence for sentence in cautions(load_config("debug", alone)))
    assert not cautions(load_config("debug", ORDER))


def test_most_forwards_may_have_no_image_with_a_path(tmp_path):
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path), *TINY, *ORDER, "order.share=0.05"]
    assert in_this_process([*words, "train.batch_size_per_gpu=2"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.jsonl").read_text().splitlines()]
    assert any(row["loss/order"] == 0 for row in rows)


def test_training_with_an_order(tmp_path):
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path), *TINY, *ORDER]
    assert in_this_process(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.jsonl").read_text().splitlines()]
    assert {name for name in rows[-1] if name.startswith("loss/")} == {"loss/simclr", "loss/order"}
    assert all(row["loss/order"] > 0 for row in rows)
    assert any("order_accuracy" in name for name in rows[-1])
