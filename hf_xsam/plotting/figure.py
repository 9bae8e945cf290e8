"""The style of each run's curves, and the figure of all panels."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox

from .panels import STEP, Panel, Table, measured_table, row_sizes
from .runs import Run

# Colours for all kinds of colour vision (after Okabe and Ito, darker: 4.5:1 on white). Dashes and markers differ too;
# their numbers have no common factor, so that combinations repeat late.
COLOURS = ("#0072b2", "#b84300", "#00795c", "#a3467f", "#806600", "#5b5b66")
DASHES: tuple[Any, ...] = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)), (0, (10, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
INK, GRID = "#1c2128", "#d5dae0"
TICKS = (1, 2, 2.5, 5, 10)

STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a run's name may contain dollar signs
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


def draw_figure(runs: Sequence[Run], drawn: Sequence[Panel], path: Path) -> None:
    """Draw the runs' names, all panels, and below them a table of what was measured, into one PNG."""
    table = measured_table(runs)
    names = [run.name for run in runs]
    sizes = row_sizes(len(drawn))
    columns = sizes[0]
    width, height = 4.4 * columns, 3.1 * len(sizes) + 0.3 * math.ceil(len(runs) / columns)
    below = 0.27 * (len(table.rows) + 2) + 0.2 if table else 0.0
    with style(10):
        figure = Figure(figsize=(width, height + below), layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
        parts = figure.subfigures(2 if table else 1, 1, squeeze=False, height_ratios=[height, below][: 1 + bool(table)])
        grid = parts[0, 0].add_gridspec(len(sizes), 6)
        places = [(row, 6 // size * place, 6 // size) for row, size in enumerate(sizes) for place in range(size)]
        for (row, first, span), panel in zip(places, drawn, strict=True):
            axes = parts[0, 0].add_subplot(grid[row, first : first + span])
            axes.set_title(fill(panel.title, 46), fontsize=10)
            draw_panel(axes, panel)
        handles = [Line2D([], [], **line_style(i)) for i in range(len(runs))]
        labels = [fill(name, 44, break_on_hyphens=False) for name in names]
        parts[0, 0].legend(handles, labels, loc="outside upper left", ncols=columns, frameon=False, handlelength=4)
        if table:
            draw_table(parts[1, 0].add_subplot(), table, names, width)
        figure.savefig(path, dpi=150)


def draw_panel(axes: Axes, panel: Panel) -> None:
    """Draw the panel's curves, with about eight markers on each, the label of the x-axis and the ticks."""
    for curve in panel.curves:
        xs = sorted(curve.points)
        gap = max(1, len(xs) // 8)
        first = curve.run * gap // 3 % gap  # so that markers of neighbouring curves do not overlap
        axes.plot(xs, [curve.points[x] for x in xs], **line_style(curve.run), markevery=(first, gap))
    axes.set_xlabel(panel.x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICKS, integer=panel.x_label == STEP))
    if panel.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICKS))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")


def draw_table(axes: Axes, table: Table, names: Sequence[str], width: float) -> None:
    """Draw the table instead of the axes, `width` inches wide."""
    axes.set_axis_off()
    axes.set_title(table.title, fontsize=10)
    first, other = (part / (0.34 + 0.17 * len(names)) for part in (0.34, 0.17))
    header = [fill(name, max(4, int(10 * width * other)), break_on_hyphens=False) for name in names]
    cells = axes.table(
        [[name, *values] for name, values in table.rows.items()],
        colLabels=["", *header],
        colWidths=[first] + [other] * len(names),
        edges="B",
        bbox=Bbox.unit(),
    )
    cells.auto_set_font_size(False)
    lines = max(text.count("\n") + 1 for text in header)
    for (row, column), cell in cells.get_celld().items():
        cell.set(edgecolor=GRID, height=cell.get_height() * (lines if row == 0 else 1))
        cell.set_text_props(ha="right" if column else "left", weight="normal" if row else "bold")
        cell.PAD = 0.02


def line_style(run: int) -> dict[str, Any]:
    """Return the Line2D options of a run's curves."""
    return {
        "color": COLOURS[run % len(COLOURS)],
        "linestyle": DASHES[run % len(DASHES)],
        "linewidth": 1.8,
        "marker": MARKERS[run % len(MARKERS)],
        "markersize": 5,
    }


def style(font_size: float) -> AbstractContextManager[None]:
    """Return a context with the matplotlib settings of all charts, with text of `font_size` points."""
    return rc_context({**STYLE, "font.size": font_size})
