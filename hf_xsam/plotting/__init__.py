"""Draw runs and measurements side by side, as a figure and as a web page."""

from .figure import draw_figure
from .page import render_page
from .panels import build_panels
from .runs import RunError, read_runs

__all__ = ["RunError", "build_panels", "draw_figure", "read_runs", "render_page"]
