"""The time of a step, and the settings of a run that is to fit into a time."""

import time
from collections.abc import Iterator

import pytest

from dinov2_eq.config.checks import LENGTHS
from dinov2_eq.config.load import load_config
from dinov2_eq.train import timing
from tests.helpers import tiny_config


def test_steps_that_warm_up_and_one_that_was_disturbed_do_not_count(monkeypatch):
    durations: Iterator[float] = iter([0.5, 0.5, 0.02, 0.02, 0.4, 0.02, 0.02])
    monkeypatch.setattr(timing, "train_step", lambda *_: time.sleep(next(durations)))
    assert 0.02 <= timing.seconds_per_step(tiny_config("optim.steps=7")) < 0.3
    assert not list(durations)


def test_a_real_step(tmp_path, monkeypatch):
    """It takes some time and leaves nothing behind; a run may be shorter than the measurement."""
    monkeypatch.chdir(tmp_path)
    for steps in (2, 20):
        assert timing.seconds_per_step(tiny_config(f"optim.steps={steps}")) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe", ["cifar10/dino", "cifar10/simclr_eq", "vicreg_vits16_paper", "vitl16_short"])
@pytest.mark.parametrize("steps", [1, 77, 5000])
def test_a_run_of_another_length(recipe, steps):
    """It is valid, and every warm-up has its share of it, within half a step."""
    before = load_config(recipe)
    after = load_config(recipe, timing.settings_for(before, steps))
    assert after.optim.steps == steps
    for key in LENGTHS:
        section, name = key.split(".")
        lengths = [getattr(getattr(config, section), name) for config in (before, after)]
        assert lengths[1] == pytest.approx(lengths[0] * steps / before.optim.steps, abs=0.5)
