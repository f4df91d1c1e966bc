"""What objectives that read theta see: which views, which numbers, in which scale, and for which images."""

import pytest
import torch

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import DATASETS, build_dataset
from dinov2_eq.objectives.linked import LinkReader, mean_of_known
from dinov2_eq.objectives.sie import SieConfig
from dinov2_eq.train.build import build_make_views, build_train_loader
from dinov2_eq.types import GLOBAL, PATH, CropTokens
from tests.helpers import TINY, in_this_process
from tests.objectives.scenes import make_scene, make_side
from tests.objectives.test_pairs import Bars
from tests.processes import run_ranks

ALONE = [*TINY, "dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0", "equivariance.enabled=false"]
SIE = [*ALONE, "sie.loss_weight=1", "sie.expander_dim=32"]
PAIRS = [*SIE, "sie.transform=data", "train.dataset_path=Bars", "crops.horizontal_flip=0"]


@pytest.fixture(autouse=True)
def pairs(monkeypatch):
    monkeypatch.setitem(DATASETS, "Bars", Bars)


def linked_scene(num_path=0, theta=None):
    """Three images with a theta of three numbers; the last one is unknown."""
    student = make_side(0)
    if num_path:
        tokens = make_side(1).tokens[GLOBAL]
        cls = tokens.cls[:num_path].detach().requires_grad_()
        student.tokens[PATH] = CropTokens(cls, tokens.patches[:num_path])
    scene = make_scene(student)
    theta = torch.arange(9.0).view(3, 3) if theta is None else theta
    known = torch.tensor([True, True, False])
    return scene._replace(views=scene.views._replace(theta=theta, known=known, path_rows=torch.arange(3)))


def test_of_a_pair_v1_is_the_source():
    scene = linked_scene()
    linked = LinkReader("cls", [0, 2], [0.0, 0.0], [1.0, 1.0])(scene)
    first, second = scene.student.tokens[GLOBAL].cls
    assert torch.equal(linked.first, first) and torch.equal(linked.source, first) and torch.equal(linked.target, second)
    assert linked.theta.tolist() == [[0, 2], [3, 5], [6, 8]] and linked.known.tolist() == [1, 1, 0]


def test_with_a_transform_u_is_the_source():
    scene = linked_scene(num_path=1)
    linked = LinkReader("mean", [1, 0], [1.0, 3.0], [2.0, 1.0])(scene)
    assert torch.equal(linked.source, scene.student.tokens[PATH].patches[0].mean(1))
    assert torch.equal(linked.target, scene.student.tokens[GLOBAL].patches[1].mean(1))
    assert linked.theta.tolist() == [[0, -3], [1.5, 0], [3, 3]]


def test_the_source_is_what_g_changes_to_the_target():
    config = load_config("debug", [*SIE, "sie.transform=rotation", "sie.border=zeros"])
    batch = next(iter(build_train_loader(config, build_dataset("Shapes:size=40"), 0, 0)))
    views = build_make_views(config)(batch._replace(theta=torch.full_like(batch.theta, 90.0)))
    (u,), target = views.groups[PATH].images, views.groups[GLOBAL].images[1]
    inside = slice(8, 24)
    torch.testing.assert_close(
        u.rot90(1, (-2, -1))[..., inside, inside], target[..., inside, inside], atol=1e-3, rtol=0
    )
    assert not torch.allclose(u, views.groups[GLOBAL].images[0], atol=0.1)


@pytest.mark.parametrize("transform", ["se2", "blur", "all"])
def test_numbers_of_g_fill_the_range_from_minus_one_to_one(transform):
    settings = SieConfig(loss_weight=1.0, transform=transform)
    g = settings.build_transform()
    reader = settings.reader(objective_context(load_config("debug", [*SIE, f"sie.transform={transform}"])))
    ends = torch.stack([g.low, g.high, (g.low + g.high) / 2])
    linked = reader(linked_scene(num_path=1, theta=ends))
    ones = torch.ones(len(g.components))
    torch.testing.assert_close(linked.theta, torch.stack([-ones, ones, 0 * ones]), atol=1e-5, rtol=0)


def test_a_number_that_never_changes_stays_finite():
    context = objective_context(load_config("debug", [*SIE, "sie.max_angle_deg=0"]))
    settings = SieConfig(loss_weight=1.0, max_angle_deg=0.0)
    assert settings.reader(context).halves[0] == 1


def test_some_numbers_of_theta():
    config = load_config("debug", [*SIE, "sie.transform=all", "sie.components=[hue,angle_deg]"])
    assert config.sie.reader(objective_context(config)).columns == [6, 0]
    config = load_config("debug", [*PAIRS, "sie.components=[angle]"])
    reader = config.sie.reader(objective_context(config))
    assert (reader.columns, reader.centres, reader.halves) == ([1], [0.0], [1.0])
    message = r"sie.components=\['angel'\]: theta has no number called 'angel'; it has object, angle"
    with pytest.raises(ValueError, match=message):
        load_config("debug", [*PAIRS, "sie.components=[angel]"])


def test_single_images_have_no_theta_of_their_own(tmp_path, capsys):
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path), *SIE, "sie.transform=data"]
    assert in_this_process(words) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "sie reads theta, which leads from one view to the other, and nothing gives it" in message


def test_one_g_for_sie_and_reconstruction():
    both = ["sie.loss_weight=1", "equivariance.max_angle_deg=30", "sie.max_angle_deg=30"]
    needs = load_config("debug", [*both, "equivariance.view=second"]).needs()
    assert needs.targets and needs.path.fractions == (0.0,)
    with pytest.raises(ValueError, match=r"sie and equivariance need different pairing; .*equivariance.view=second"):
        load_config("debug", both)


def test_a_weight_of_zero_needs_nothing():
    config = load_config("debug", [*ALONE, "dino.loss_weight=1", "sie.transform=no such", "sie.components=[no such]"])
    assert config.needs().path is None and not config.needs().theta


def test_known_are_always_the_same_images_and_as_many_as_asked():
    def known(*overrides):
        config = load_config("debug", [*SIE, "train.batch_size_per_gpu=100", *overrides])
        dataset = build_dataset("Shapes:split=TRAIN:num=200:size=8")
        batches = iter(build_train_loader(config, dataset, 0, 0))
        found = [[], []]
        for epoch in range(2):
            for step in range(2):
                order = build_train_loader(config, dataset, 2 * epoch + step, 0).sampler
                indices = [index for (_, index), _ in zip(order, range(100), strict=False)]
                found[epoch] += [i for i, told in zip(indices, next(batches).known.tolist(), strict=True) if told]
        return [sorted(indices) for indices in found]

    first, second = known("train.known_share=0.2")
    assert first == second and 25 <= len(first) <= 55
    assert known("train.known_share=0.2", "train.seed=1")[0] != first
    assert known()[0] == list(range(200))


def test_the_mean_of_known():
    values, known = torch.tensor([1.0, 5.0, 9.0], requires_grad=True), torch.tensor([1.0, 0.0, 1.0])
    assert mean_of_known(values, known) == 5
    nothing = mean_of_known(values, 0 * known)
    nothing.backward()
    assert nothing == 0 and values.grad.tolist() == [0, 0, 0]


def mean_of_a_share():
    torch.distributed.init_process_group("gloo")
    known = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0])]
    rank = torch.distributed.get_rank()
    return mean_of_known(torch.tensor([3.0, 7.0]) + rank, known[rank]).item()


def test_the_mean_of_known_on_three_processes():
    parts = run_ranks(mean_of_a_share, 3)
    assert parts[1] == 0 and sum(parts) / 3 == pytest.approx((3 + 5 + 9) / 3)
