"""A bare checkout with two releases, made by the program from runs of one step: one with the task, one without."""

import os
import shutil
from pathlib import Path

import pytest

from dinov2_eq.hub import manifest
from dinov2_eq.train.train import do_train
from tests.helpers import tiny_config
from tools.release_weights import main as release_weights

ROOT = Path(__file__).parents[2]
STEP = ["optim.steps=1", "optim.warmup_steps=0", "teacher.warmup_teacher_temp_steps=0", "student.layerscale=1.0"]
ABOUT = ["--data", "24 generated pictures", "--notes", "made by a test", "--result", "top-1 %=12.5"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    halves = ["equivariance.invariant_projection=true", "crops.mean=[0.4,0.5,0.6]"]
    do_train(tiny_config(*STEP, *halves), folder / "split")
    do_train(tiny_config(*STEP, "equivariance.enabled=false", "student.num_register_tokens=2"), folder / "plain")
    return {name: folder / name for name in ("split", "plain")}


@pytest.fixture(scope="session")
def checkout(tmp_path_factory, runs) -> Path:
    """hubconf.py, the package and weights/, as a shallow clone would have them."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "dinov2_eq", folder / "dinov2_eq", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "hubconf.py", folder)
    output = ["--output", str(folder / "weights")]
    release_weights([str(runs["split"]), "split", *ABOUT, *output, "--default"])
    release_weights([str(runs["plain"]), "plain", *ABOUT, *output])
    return folder


@pytest.fixture
def released(checkout, monkeypatch, tmp_path) -> Path:
    """The checkout's weights are those that the entry points find; the cache is empty."""
    monkeypatch.setattr(manifest, "PACKAGE", checkout / "dinov2_eq")
    monkeypatch.setitem(os.environ, "TORCH_HOME", str(tmp_path / "torch_home"))
    return checkout / "weights"
