"""What the README shows is true."""

import re
from pathlib import Path

import torch

from dinov2_eq.equivariance.transforms import TransformRanges

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
