"""Logs for people (`setup_logging`), metrics for programs (`MetricLogger`), facts about a run (`describe_run`)."""

from dinov2_eq.logging.metrics import MetricLogger, first_value
from dinov2_eq.logging.setup import describe_run, progress_bar, setup_logging

__all__ = [
    "MetricLogger",
    "describe_run",
    "first_value",
    "progress_bar",
    "setup_logging",
]
