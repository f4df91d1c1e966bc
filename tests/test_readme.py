"""What the README shows is true."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from dinov2_eq.config.load import find_recipe
from dinov2_eq.equivariance.transforms import TransformRanges
from dinov2_eq.run.cli import find_command

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_transform_of_your_own_runs():
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", README, re.DOTALL)[1], names)
    transform = names["Gamma"](TransformRanges())
    images = torch.rand(2, 3, 8, 8)
    torch.testing.assert_close(transform.apply(images, torch.zeros(2, 1), (8, 8)), images)
    assert transform.sample(5, torch.Generator()).shape == (5, 1)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"] and all(f"\n{target}:" in makefile for target in targets)


@pytest.mark.parametrize("line", re.findall(r"^dinov2-eq .*", README, re.MULTILINE))
def test_commands_and_recipes_exist(line):
    name, rest = find_command(shlex.split(line, comments=True)[1:])
    if name == "train":
        find_recipe(rest[rest.index("--config-file") + 1])


def test_files_it_points_to_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
