"""What is drawn of runs: panels of curves, and tables."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..step.logs import NOT_RESULTS
from .runs import Run, is_number

MEASURED = "measured"
ESTIMATED = "X-SAM's estimate"
STEP = "optimizer step"
DISTANCE = "distance from the final weights"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the run's number, the kind of its values where a panel has two, and y by x."""

    run: int
    points: dict[float, float]
    kind: str = ""

    @property
    def last(self) -> float:
        """Return the value at the greatest x."""
        return self.points[max(self.points)]


@dataclass(frozen=True)
class Panel:
    """Curves in the same axes. `log` is whether the y-axis is logarithmic."""

    title: str
    x_label: str
    curves: list[Curve]
    log: bool = False


@dataclass(frozen=True)
class Table:
    """Rows of a name and a cell for each run; an empty cell where a run lacks the figure."""

    title: str
    rows: dict[str, list[str]]


def build_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels that some run has data for, those over steps first, then the slices of the final loss."""
    results = {name: None for run in runs for line in run.history for name in line if name.startswith("eval_")}
    metrics = [name for name in results if not name.endswith(NOT_RESULTS)]
    metrics.sort(key=lambda name: not name.endswith("loss"))  # losses first; the rest as logged
    over_steps = [("Training loss", {"loss": ""})]
    over_steps += [(f"Evaluation {name.removeprefix('eval_').replace('_', ' ')}", {name: ""}) for name in metrics]
    over_steps += [
        ("Top eigenvalue of the Hessian", {"sharpness/top_eigenvalue": MEASURED, "xsam/eigenvalue": ESTIMATED}),
        ("Angle, gradient to eigenvector (°)", {"xsam/angle_degrees": ""}),
        (f"Sharpness: perturbed loss {MINUS} loss", {"xsam/sharpness": ""}),
        ("Measured angle, gradient to eigenvector (°)", {"sharpness/gradient_angle_degrees": ""}),
        ("Measured SAM sharpness", {"sharpness/sam_sharpness": ""}),
        ("Measured trace of the Hessian", {"sharpness/trace": ""}),
    ]
    found = []
    for title, names in over_steps:
        curves = [
            Curve(number, points, kind)
            for number, run in enumerate(runs)
            for name, kind in names.items()
            if (points := {line["step"]: line[name] for line in run.history if is_number(line.get(name))})
        ]
        found.append(Panel(title, STEP, curves, log="xsam/eigenvalue" in names and spans_decade(curves)))
    for direction, title in (
        ("eigenvector", "Loss along the top eigenvector"),
        ("gradient", "Loss along the gradient"),
    ):
        curves = [
            Curve(number, run.sharpness.slices[direction])
            for number, run in enumerate(runs)
            if run.sharpness and run.sharpness.slices.get(direction)
        ]
        found.append(Panel(title, DISTANCE, curves))
    return [panel for panel in found if panel.curves]


def spans_decade(curves: Iterable[Curve]) -> bool:
    """Return whether a logarithmic axis shows the curves better: all above 0, the highest over 10 times the lowest."""
    values = [y for curve in curves for y in curve.points.values() if math.isfinite(y)]
    return bool(values) and 0 < 10 * min(values) < max(values)


def last_values(drawn: Sequence[Panel], count: int) -> Table:
    """Return the last value of each curve over steps, for `count` runs."""
    rows: dict[str, list[str]] = {}
    for panel in drawn:
        for curve in panel.curves if panel.x_label == STEP else []:
            name = f"{panel.title}, {curve.kind}" if curve.kind else panel.title
            rows.setdefault(name, [""] * count)[curve.run] = number(curve.last)
    return Table("Last logged values", rows)


def measured_table(runs: Sequence[Run]) -> Table | None:
    """Return what was measured of the trained models; None where nothing was."""
    figures = [run.sharpness.figures if run.sharpness else {} for run in runs]
    names = dict.fromkeys(name for column in figures for name in column)
    rows = {name: [" ± ".join(map(number, column.get(name, ()))) for column in figures] for name in names}
    return Table("Measured after training", rows) if rows else None


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings, by name, under which the runs' sharpness was not measured alike, with each run's value."""
    settings = [run.sharpness.settings for run in runs if run.sharpness]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, "not given") for each in settings] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def number(value: float) -> str:
    """Return the number with four significant digits."""
    return f"{value:#.4g}".removesuffix(".").replace("-", MINUS)
