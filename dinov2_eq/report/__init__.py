"""Self-contained HTML pages about run folders (`load_runs`, then `render_page`) and about results of `eval`."""

from dinov2_eq.report.card import MAX_ENCODERS, render_card
from dinov2_eq.report.evaluations import render_evaluations
from dinov2_eq.report.page import render_page
from dinov2_eq.report.runs import load_runs

__all__ = ["MAX_ENCODERS", "load_runs", "render_card", "render_evaluations", "render_page"]
