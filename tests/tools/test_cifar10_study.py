"""Runs `cifar10_study.sh` with a program in place of dinov2-eq that only records its arguments."""

import os
import subprocess
from pathlib import Path

from dinov2_eq.config.load import find_recipe
from dinov2_eq.eval import equivariance, knn
from dinov2_eq.train import train

ROOT = Path(__file__).parents[2]


def test_recipes_are_trained_and_probed(tmp_path):
    """Runs the named recipes, or else all, with commands that dinov2-eq accepts."""
    program = tmp_path / "dinov2-eq"
    program.write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/calls"\n')
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    recipes = {path.stem for path in (ROOT / "configs/train/cifar10").glob("*.yaml")} - {"base"}
    for named in (["disabled", "long_lambda_5"], []):
        study = [ROOT / "tools/cifar10_study.sh", tmp_path, tmp_path / "out", *named]
        done = subprocess.run(study, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        calls = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
        (tmp_path / "calls").unlink()
        trained = [train.build_parser().parse_intermixed_args(call[1:]) for call in calls if call[0] == "train"]
        assert {given.config_file for given in trained} == {f"cifar10/{name}" for name in named or recipes}
        for given in trained:
            assert find_recipe(given.config_file)
            assert given.overrides == [f"train.dataset_path=CIFAR10:split=TRAIN:root={tmp_path.resolve()}"]
        for evaluation, module in (("knn", knn), ("equivariance", equivariance)):
            probes = [module.build_parser().parse_args(call[2:]) for call in calls if call[:2] == ["eval", evaluation]]
            assert sorted(probe.pretrained_weights for probe in probes) == sorted(
                str(given.output_dir) for given in trained
            )
