"""A run so small that whole trainings fit in a unit test."""

from dinov2_eq.config.load import load_config
from dinov2_eq.config.schema import Config

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


def tiny_config(*overrides: str) -> Config:
    return load_config("debug", [*TINY, *overrides])
