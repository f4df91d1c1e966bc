"""One self-contained page about one or several run folders: `load_runs`, then `render_page`."""

from dinov2_eq.report.page import render_page
from dinov2_eq.report.runs import load_runs

__all__ = ["load_runs", "render_page"]
