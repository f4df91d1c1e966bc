"""SIE against slow loops, its predictor's algebra, unknown theta, its variants, and two processes against one."""

import json
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from dinov2_eq.config.checks import objective_context
from dinov2_eq.config.load import load_config
from dinov2_eq.data.datasets import DATASETS, build_dataset
from dinov2_eq.objectives.linked import LinkReader
from dinov2_eq.objectives.sie import SIE, Hypernetwork, SieConfig, encode_on_circles, sie_terms
from dinov2_eq.objectives.vicreg import vicreg_terms
from dinov2_eq.train.build import build_train_loader
from dinov2_eq.train.train import do_train
from dinov2_eq.types import GLOBAL, PATH
from tests.helpers import in_this_process
from tests.objectives.test_linked import PAIRS, linked_scene
from tests.objectives.test_pairs import Bars
from tests.objectives.test_simclr import in_a_group
from tests.processes import run_ranks
from tests.rendered import write_objects

BATCH, INV, EQUI = 6, 3, 4
KNOWN = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0])  # two of the first half, one of the second


def parts(seed=0):
    """x_inv, x_equi, y_inv, y_equi and the prediction."""
    generator = torch.Generator().manual_seed(seed)
    return [0.5 * torch.randn(BATCH, dim, generator=generator) for dim in (INV, EQUI, INV, EQUI, EQUI)]


def squares(first, second):
    return sum((a - b) ** 2 for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True))


def hinge(rows):
    return sum(max(0.0, 1 - math.sqrt(np.var(column, ddof=1) + 1e-4)) for column in rows.T.numpy()) / rows.shape[1]


def slow_terms(x_inv, x_equi, y_inv, y_equi, predicted, known):
    chosen = [row for row in range(BATCH) if known[row]]
    x, y = np.hstack([x_inv, x_equi]), np.hstack([y_inv, y_equi])
    covariance, dim = 0.0, x.shape[1]
    for view in (x, y):
        for d in range(dim):
            for e in range(dim):
                if d != e:
                    covariance += np.cov(view[:, d], view[:, e])[0, 1] ** 2 / dim
    return (
        squares(x_inv, y_inv) / x_inv.numel(),
        squares(predicted[chosen], y_equi[chosen]) / (len(chosen) * EQUI),
        (hinge(torch.from_numpy(x)) + hinge(torch.from_numpy(y))) / 2,
        hinge(predicted[chosen]),
        covariance,
    )


@pytest.mark.parametrize("known", [KNOWN, torch.ones(BATCH), torch.tensor([0.0, 1, 1, 0, 0, 0])])
def test_against_a_loop(known):
    found = sie_terms(*parts(), known)
    assert [term.item() for term in found] == pytest.approx(slow_terms(*parts(), known), rel=1e-5)


def test_with_few_or_no_known_pairs_the_rest_remains():
    everything = sie_terms(*parts(), torch.ones(BATCH))
    leaves = [part.requires_grad_() for part in parts()]
    one = sie_terms(*leaves, torch.eye(BATCH)[2])
    assert one.predicted_variance == 0
    assert one.prediction.item() == pytest.approx(squares(leaves[4][2].detach(), leaves[3][2].detach()) / EQUI)
    none = sie_terms(*leaves, torch.zeros(BATCH))
    assert none.prediction == 0 and none.predicted_variance == 0
    for name in ("invariance", "variance", "covariance"):
        assert getattr(none, name) == getattr(everything, name)
    (none.prediction + none.predicted_variance).backward()
    assert leaves[4].grad.abs().sum() == 0 and leaves[3].grad.abs().sum() == 0


def total(views, known):
    return sum(weight * term for weight, term in zip((10, 4.5, 10, 5, 1), sie_terms(*views, known), strict=True))


def gradients_of_a_share(known):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    views = [part[own].requires_grad_() for part in parts()]
    (total(views, known[own]) / world).backward()  # gradients are averaged over processes
    return torch.cat([view.grad for view in views], dim=1).numpy()


@pytest.mark.parametrize("known", [KNOWN, torch.tensor([1.0, 1, 1, 0, 0, 0])])
def test_two_processes_equal_one(known):
    views = [part.requires_grad_() for part in parts()]
    total(views, known).backward()
    expected = torch.cat([view.grad for view in views], dim=1)
    shares = run_ranks(in_a_group_with, 2, known)
    assert (torch.cat([torch.from_numpy(share) for share in shares]) - expected).norm() < 1e-6 * expected.norm()


def in_a_group_with(known):
    return in_a_group(lambda: gradients_of_a_share(known))


def test_the_predictor_is_linear_in_the_code_and_in_the_embedding():
    predictor = Hypernetwork(num_codes=3, dim=EQUI)
    embedding, code = torch.randn(BATCH, EQUI), torch.randn(BATCH, 3)
    matrices = predictor.matrices.weight.view(3, EQUI, EQUI)
    slow = []
    for z, c in zip(embedding, code, strict=True):
        slow.append(sum(c[k] * matrices[k] for k in range(3)) @ z)
    torch.testing.assert_close(predictor(embedding, code), torch.stack(slow))
    assert predictor(embedding, 0 * code).abs().sum() == 0
    assert [tuple(parameter.shape) for parameter in predictor.parameters()] == [(3 * EQUI, EQUI)]


def test_at_the_start_predictions_are_as_large_as_embeddings():
    torch.manual_seed(0)
    embedding = torch.randn(64, 256)
    code = torch.nn.functional.normalize(torch.randn(64, 4), dim=1)
    ratio = Hypernetwork(4, 256)(embedding, code).norm() / embedding.norm()
    assert 0.4 < ratio < 0.8  # 1 / sqrt(3)


@pytest.mark.parametrize("angle_deg", [0.0, 20.0, -45.0])
def test_the_predictor_can_rotate_features_and_leave_them_at_theta_zero(angle_deg):
    """Features of a dial, (cos, sin) of three times its angle: a rotation of the dial is a W(theta)."""
    predictor = Hypernetwork(2, 2)
    with torch.no_grad():
        predictor.matrices.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [1.0, 0.0]]))
    start = torch.linspace(0, math.pi, 5)
    turned = 3 * (start + math.radians(angle_deg))
    code = encode_on_circles(torch.full((5, 1), angle_deg / 45))
    predicted = predictor(torch.stack([(3 * start).cos(), (3 * start).sin()], 1), code)
    torch.testing.assert_close(predicted, torch.stack([turned.cos(), turned.sin()], 1))


def missed_by_a_constant(codes):
    """The share of its square that the best linear function of the codes misses of the constant 1."""
    ones = np.ones(len(codes))
    return float(np.mean((codes @ np.linalg.lstsq(codes, ones, rcond=None)[0] - ones) ** 2))


def test_the_documented_distance_from_a_predictor_that_ignores_theta():
    numbers = 2 * torch.rand(100000, 8, generator=torch.Generator().manual_seed(0)) - 1
    assert missed_by_a_constant(encode_on_circles(numbers[:, :1]).numpy()) == pytest.approx(0.77, abs=0.01)
    assert missed_by_a_constant(encode_on_circles(numbers).numpy()) == pytest.approx(0.30, abs=0.01)
    assert missed_by_a_constant(encode_on_circles(2 / 3 * numbers[:, :1]).numpy()) == pytest.approx(0.19, abs=0.01)
    assert missed_by_a_constant(encode_on_circles(2 / 3 * numbers).numpy()) == pytest.approx(0.03, abs=0.01)
    angles = np.random.default_rng(0).uniform(-np.pi / 2, np.pi / 2, (2, 100000, 3))
    first, second = (Rotation.from_euler("xyz", each) for each in angles)
    assert missed_by_a_constant((first.inv() * second).as_quat()) == pytest.approx(0.24, abs=0.01)


def build(transform="rotation", **settings):
    torch.manual_seed(0)
    reader = LinkReader("cls", [0, 2], [4.0, 4.0], [4.0, 4.0])
    return SIE(SieConfig(loss_weight=1.0, transform=transform, **settings), reader, dim=8)


COEFFICIENTS = ("invariance", "prediction", "variance", "predicted_variance", "covariance")


@pytest.mark.parametrize("transform", ["rotation", "data"])
def test_the_objective_halves_predicts_and_weighs(transform):
    scene = linked_scene(num_path=0 if transform == "data" else 1)
    weights = dict(zip((f"{name}_coefficient" for name in COEFFICIENTS), (2.0, 3.0, 4.0, 5.0, 6.0), strict=True))
    objective = build(transform, expander_dim=12, equivariant_share=0.25, **weights)
    (v1, y), tokens = scene.student.tokens[GLOBAL].cls, scene.student.tokens
    x = v1 if transform == "data" else tokens[PATH].cls[0]
    x_inv, y_inv = objective.invariant_expander(torch.cat([v1[:, :6], y[:, :6]])).chunk(2)
    x_equi, y_equi = objective.equivariant_expander(torch.cat([x[:, 6:], y[:, 6:]])).chunk(2)
    assert (x_inv.shape[1], x_equi.shape[1]) == (9, 3)
    theta = (scene.views.theta[:, [0, 2]] - 4) / 4
    phi = 3 / 4 * math.pi * theta
    code = theta if transform == "data" else torch.cat([phi.cos(), phi.sin()], 1)
    terms = sie_terms(x_inv, x_equi, y_inv, y_equi, objective.predictor(x_equi, code), scene.views.known.float())
    term = objective(scene)
    assert set(term.metrics) == {f"sie_{name}" for name in COEFFICIENTS}
    expected = sum(weights[f"{name}_coefficient"] * getattr(terms, name) for name in COEFFICIENTS)
    torch.testing.assert_close(term.loss, expected)


def test_all_may_be_equivariant():
    scene = linked_scene(num_path=1)
    objective = build(equivariant_share=1.0, prediction_coefficient=10.0, expander_dim=12)
    assert not hasattr(objective, "invariant_expander") and objective.equivariant_expander[0].in_features == 8
    term = objective(scene)
    assert term.metrics["sie_invariance"] == 0 and torch.isfinite(term.loss)
    x, y = scene.student.tokens[PATH].cls[0], scene.student.tokens[GLOBAL].cls[1]
    _, variance, covariance = vicreg_terms(*objective.equivariant_expander(torch.cat([x, y])).chunk(2))
    torch.testing.assert_close(term.metrics["sie_variance"], variance)
    torch.testing.assert_close(term.metrics["sie_covariance"], covariance)


def test_the_published_coefficients_are_the_defaults():
    settings = SieConfig()
    values = [getattr(settings, f"{name}_coefficient") for name in COEFFICIENTS]
    assert values == [10, 4.5, 10, 5, 1] and settings.equivariant_share == 0.5
    with pytest.raises(ValueError, match=r"sie.equivariant_share=0.0 must lie in \(0, 1\]"):
        load_config("debug", ["sie.loss_weight=1", "sie.equivariant_share=0", "equivariance.enabled=false"])


def test_training_on_pairs_with_a_theta_of_their_own(tmp_path, monkeypatch):
    """One pair in sixteen is unknown, and half of the others are not told."""
    monkeypatch.setitem(DATASETS, "Bars", Bars)
    words = ["train", "--config-file", "debug", "--output-dir", str(tmp_path), *PAIRS, "train.known_share=0.5"]
    assert in_this_process([*words, "sie.components=[angle]"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "training_metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and {name for name in rows[0] if name.startswith("loss/")} == {"loss/sie"}
    weights = torch.load(tmp_path / "eval/training_6/teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in weights} == {"backbone"}  # as any other base method


def test_the_recipe_for_3diebench_reads_its_rotations(tmp_path):
    write_objects(tmp_path, {"train": ["0/a", "1/b"]}, {"train": [0, 1]}, 4, size=32)
    config = load_config(
        "sie_3diebench",
        [
            *("crops.global_crops_size=32", "train.batch_size_per_gpu=8", "train.num_workers=0", "sie.expander_dim=32"),
            *(f"train.dataset_path=3DIEBench:split=TRAIN:root={tmp_path}", "optim.steps=2", "optim.warmup_steps=0"),
        ],
    )
    batch = next(iter(build_train_loader(config, build_dataset(config.train.dataset_path), 0, 0)))
    assert batch.known.all() and config.sie.reader(objective_context(config)).columns == [0, 1, 2, 3]
    torch.testing.assert_close(batch.theta[:, :4].norm(dim=1), torch.ones(8))
    do_train(config, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run/training_metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(row["loss/sie"]) for row in rows if "loss/sie" in row)
