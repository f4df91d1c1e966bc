"""A method is one file and one entry: the toy trains beside DINO, and alone."""

import json

import pytest
import torch

from dinov2_eq.config.load import load_config
from dinov2_eq.objectives import OBJECTIVES
from dinov2_eq.objectives.base import Needs, union
from dinov2_eq.objectives.reconstruction import EquivarianceConfig
from dinov2_eq.train.build import build_arch
from dinov2_eq.train.ssl_meta_arch import Network
from dinov2_eq.types import PATH
from tests.helpers import TINY, in_this_process
from tests.objectives.toy import ToyConfig


@pytest.fixture(autouse=True)
def entry(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "toy", ToyConfig)


def train(folder, *overrides):
    common = ["train", "--config-file", "debug", "--output-dir", str(folder), *TINY, "equivariance.enabled=false"]
    assert in_this_process([*common, *overrides]) == 0
    return [json.loads(line) for line in (folder / "training_metrics.jsonl").read_text().splitlines()]


def test_the_toy_trains_beside_dino(tmp_path):
    rows = train(tmp_path, "toy.loss_weight=1")
    assert {name for name in rows[0] if name.startswith("loss/")} >= {"loss/dino", "loss/ibot", "loss/toy"}
    assert all(row["toy_images"] == 2 for row in rows)  # half of 4
    assert "toy:\n  loss_weight: 1.0\n  share: 0.5" in (tmp_path / "config.yaml").read_text()


ALONE = ["dino.loss_weight=0", "dino.koleo_loss_weight=0", "ibot.loss_weight=0", "toy.loss_weight=1"]


def test_alone_it_runs_no_teacher_no_head_and_no_local_crops(tmp_path):
    arch = build_arch(load_config("debug", [*TINY, *ALONE, "equivariance.enabled=false"]), torch.device("cpu"))
    assert arch.teacher is None and set(arch.student) == {"backbone", "projection"}
    rows = train(tmp_path, *ALONE)
    assert {name for name in rows[0] if name.startswith("loss/")} == {"loss/toy"}
    weights = torch.load(tmp_path / "eval/training_6/teacher_checkpoint.pth", weights_only=True)["teacher"]
    assert {name.split(".")[0] for name in weights} == {"backbone"}  # the student, as there is no teacher


def test_the_student_encodes_what_is_needed(monkeypatch, tmp_path):
    seen, original = [], Network.forward

    def forward(self, groups):
        seen.append({name: tuple(group.images.shape[:2]) for name, group in groups.items()})
        assert all(group.masks is None for group in groups.values())
        return original(self, groups)

    monkeypatch.setattr(Network, "forward", forward)
    train(tmp_path, *ALONE, "optim.steps=2")
    assert seen == [{"global": (2, 4), PATH: (1, 2)}] * 2


def test_its_settings_are_checked_like_all():
    with pytest.raises(ValueError, match=r"toy.share=0.0 must lie in \(0, 1\]"):
        load_config("debug", ["toy.loss_weight=1", "toy.share=0"])
    with pytest.raises(ValueError, match=r"unknown key 'toy.shares'. Did you mean 'toy.share'"):
        load_config("debug", ["toy.shares=1"])
    with pytest.raises(ValueError, match=r"toy and equivariance need different pairing|equivariance and toy need"):
        load_config("debug", ["toy.loss_weight=1"])


def test_two_sections_share_a_transform_when_they_agree_on_it():
    first, same, other = EquivarianceConfig(), EquivarianceConfig(), EquivarianceConfig(max_angle_deg=10.0)
    joined = union({"equivariance": Needs(pairing=first.pairing(0.0)), "second": Needs(pairing=same.pairing(0.0))})
    assert joined.pairing().transform.high[0] == 45
    with pytest.raises(ValueError, match="equivariance and second need different pairing"):
        union({"equivariance": Needs(pairing=first.pairing(0.0)), "second": Needs(pairing=other.pairing(0.0))})
