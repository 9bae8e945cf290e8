"""The page of `hf-xsam plot`: one HTML file that loads nothing from the network, with a light and a dark theme."""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from .figure import COLOURS, GRID, INK, draw_panel, line_style, style
from .panels import (
    STEP,
    Curve,
    Panel,
    differing_settings,
    last_values,
    measured_table,
    number,
    row_sizes,
    settings_table,
)
from .runs import Run

ROWS = 100  # maximum rows of each curve in a chart's table


@dataclass(frozen=True)
class Chart:
    """A panel as the template shows it.

    Attributes:
        panel: the panel.
        span: its width in a row on a wide screen, in sixths.
        svg: its curves and axes.
        top, bottom: distance of the axes from the SVG's edges, in percent of its height.
        rows: the value of x, its position in percent of the SVG's width, and a cell for each curve.
        thinned: whether the rows omit some of the points.
        summary: the chart in words.
    """

    panel: Panel
    span: int
    svg: Markup
    top: float
    bottom: float
    rows: list[tuple[str, float, list[str]]]
    thinned: bool
    summary: str


def render_page(runs: Sequence[Run], drawn: Sequence[Panel]) -> str:
    """Return the page, as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    over_steps = [panel for panel in drawn if panel.x_label == STEP]
    slices = [panel for panel in drawn if panel.x_label != STEP]
    return environment.get_template("page.html").render(
        version=version("hf_xsam"),
        number=number,
        row_limit=ROWS,
        runs=runs,
        swatches=[draw_swatch(f"swatch{i}", i) for i in range(len(runs))],
        settings=settings_table(runs),
        over_steps=draw_charts("steps", over_steps, runs),
        slices=draw_charts("slices", slices, runs),
        last=last_values(drawn, len(runs)),
        measured=measured_table(runs),
        differing=differing_settings(runs),
    )


def draw_charts(key: str, panels: Sequence[Panel], runs: Sequence[Run]) -> list[Chart]:
    """Draw the panels of one grid."""
    spans = [6 // size for size in row_sizes(len(panels)) for _ in range(size)]
    return [
        draw_chart(f"{key}{i}", panel, span, runs) for i, (panel, span) in enumerate(zip(panels, spans, strict=True))
    ]


def draw_chart(key: str, panel: Panel, span: int, runs: Sequence[Run]) -> Chart:
    """Draw the panel; every id in its SVG starts with `key`."""
    with style(13):
        figure = Figure(figsize=(4.6, 3.1), layout="constrained", dpi=72)
        axes = figure.add_subplot()
        draw_panel(axes, panel)
        svg = themed_svg(figure, key)
    edges = axes.get_position()
    curves = [thinned(curve) for curve in panel.curves]
    xs = sorted({x for points in curves for x in points})
    places = axes.transData.transform([(x, axes.get_ylim()[0]) for x in xs])[:, 0] / figure.bbox.width
    ends = [
        f"{runs[curve.run].name}: from {number(curve.points[min(curve.points)])} to {number(curve.last)}"
        for curve in panel.curves
    ]
    return Chart(
        panel=panel,
        span=span,
        svg=svg,
        top=100 * (1 - edges.y1),
        bottom=100 * edges.y0,
        rows=[
            (f"{x:.4g}" if panel.x_label != STEP else f"{x:.0f}", 100 * place, [_cell(points, x) for points in curves])
            for x, place in zip(xs, places, strict=True)
        ],
        thinned=any(len(curve.points) > ROWS for curve in panel.curves),
        summary=f"{panel.title} by {panel.x_label}. {'; '.join(ends)}.",
    )


def draw_swatch(key: str, run: int) -> Markup:
    """Draw a short piece of the run's line, 36 by 14 points."""
    with style(13):
        figure = Figure(figsize=(36 / 72, 14 / 72), dpi=72)
        figure.add_artist(Line2D([0, 0.5, 1], [0.5] * 3, **line_style(run), markevery=[1]))
        return themed_svg(figure, key)


def themed_svg(figure: Figure, key: str) -> Markup:
    """Return the figure as an SVG in the page's colours; its ids start with `key`."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": key}):
        figure.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*</metadata>|<style.*?</style>", "", text.getvalue())
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{key}-", svg).replace("<svg", f'<svg id="{key}"', 1)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    for i, colour in enumerate(COLOURS):
        svg = svg.replace(colour, f"var(--line-{i})")
    return Markup(svg)


def thinned(curve: Curve) -> dict[float, float]:
    """Return at most `ROWS` evenly chosen points of the curve, including the first and the last."""
    xs = sorted(curve.points)
    last = len(xs) - 1
    places = range(len(xs)) if last < ROWS else [round(i * last / (ROWS - 1)) for i in range(ROWS)]
    return {xs[i]: curve.points[xs[i]] for i in places}


def _cell(points: dict[float, float], x: float) -> str:
    return number(points[x]) if x in points else ""
