"""A run so small that whole trainings fit in a unit test, and programs without an interpreter of their own."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dinov2_eq.config.load import find_recipe, load_config
from dinov2_eq.config.schema import Config
from dinov2_eq.config.yaml_files import read_yaml
from dinov2_eq.evaluation.programs import Programs
from dinov2_eq.run import cli

TINY = [
    "student.depth=1",
    "student.drop_path_rate=0.3",
    "train.dataset_path=Shapes:split=TRAIN:num=24:size=32",
    "train.log_period_steps=1",
    "train.checkpoint_period_steps=3",
    "optim.steps=6",
    "optim.warmup_steps=2",
    "teacher.warmup_teacher_temp_steps=2",
    "evaluation.knn_period_steps=0",
    "evaluation.sample_period_steps=0",
]
# The recipe `paper_task` as overrides.
PAPERS_FORM = [
    f"equivariance.{key}={str(value).lower()}"
    for key, value in read_yaml(find_recipe("paper_task"))["equivariance"].items()
]


def tiny_config(*overrides: str) -> Config:
    return load_config("debug", [*TINY, *overrides])


def in_this_process(words: list[str]) -> int:
    """The exit code of `dinov2-eq WORDS`."""
    try:
        return cli.main(words)
    except SystemExit as stop:
        return stop.code or 0


def stand_in_for_programs(monkeypatch: pytest.MonkeyPatch, carry_out: Callable[[list[str]], int]) -> list[list[str]]:
    """`eval all` and `sweep` call this where they would start an interpreter, which takes most of the time.

    Returns:
        the words that each program was given, filled while the command goes on.
    """
    calls: list[list[str]] = []

    def run(self: Programs, words: Sequence[str], log: Path) -> int:
        calls.append(list(words))
        with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return carry_out(calls[-1])

    monkeypatch.setattr(Programs, "run", run)
    return calls
