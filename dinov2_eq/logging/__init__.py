"""Logs for people (`setup_logging`), metrics for programs (`MetricLogger`), what a run consists of (`describe_run`)."""

from dinov2_eq.logging.metrics import MetricLogger, first_value
from dinov2_eq.logging.setup import describe_run, setup_logging
from dinov2_eq.logging.writable import check_writable, disk_errors_explained, replace_text

__all__ = [
    "MetricLogger",
    "check_writable",
    "describe_run",
    "disk_errors_explained",
    "first_value",
    "replace_text",
    "setup_logging",
]
