"""What is drawn of runs: panels of curves, and tables."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..step.logs import NOT_RESULTS
from .runs import Run

STEP = "optimizer step"
DISTANCE = "distance from the final weights"
MINUS = "\N{MINUS SIGN}"
TESTS = ("test_", "predict_")  # how the names of a test's results start, in the recipes and in Transformers' examples
COUNTS = ("epoch", "samples", "total_flos")  # more endings, beside `NOT_RESULTS`, of numbers that are not results
WORDS = {"eval": "evaluation", "gib": "(GiB)"}  # parts of logged names, in words
ESTIMATE = (
    "The estimate that X-SAM logs while it trains, from one batch at a time: it is noisy and usually too low, so do "
    "not compare runs by it."
)


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the run's number, and y by x."""

    run: int
    points: dict[float, float]

    @property
    def last(self) -> float:
        """Return the value at the greatest x."""
        return self.points[max(self.points)]


@dataclass(frozen=True)
class Panel:
    """Curves in the same axes. `log` is whether the y-axis is logarithmic; `note` says how to read the curves."""

    title: str
    x_label: str
    curves: list[Curve]
    log: bool = False
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of a name and a cell for each run; an empty cell if a run lacks the figure."""

    title: str
    rows: dict[str, list[str]]


def build_panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels that some run has data for, those over steps first, then the slices of the final loss."""
    logged = dict.fromkeys(name for run in runs for line in run.history for name in line)
    metrics = [name for name in logged if name.startswith("eval_") and not name.endswith(NOT_RESULTS)]
    metrics.sort(key=lambda name: not name.endswith("loss"))  # losses first; the rest as logged
    over_steps = {"loss": "Training loss"}
    over_steps |= {name: in_words(name) for name in metrics}
    over_steps |= {
        "sharpness/top_eigenvalue": "Measured top eigenvalue of the Hessian",
        "sharpness/gradient_angle_degrees": "Measured angle, gradient to eigenvector (°)",
    }
    measured = "sharpness/sam_sharpness"
    over_steps |= {
        name: f"Measured SAM sharpness{name.removeprefix(measured).replace('_', ', rho ')}"
        for name in logged
        if name.startswith(measured)
    }
    over_steps |= {
        "sharpness/trace": "Measured trace of the Hessian",
        "xsam/rayleigh_quotient": "X-SAM's estimate of the top eigenvalue",
        "xsam/angle_degrees": "Angle, gradient to X-SAM's eigenvector (°)",
        "xsam/sharpness": f"Sharpness: perturbed loss {MINUS} loss",
    }
    found = []
    for name, title in over_steps.items():
        curves = [Curve(number, points) for number, run in enumerate(runs) if (points := run.points(name))]
        log = name.endswith(("eigenvalue", "quotient")) and spans_decade(curves)
        found.append(Panel(title, STEP, curves, log, note=ESTIMATE if name == "xsam/rayleigh_quotient" else ""))
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


def row_sizes(count: int) -> list[int]:
    """Return how many of `count` panels go into each row: three, and two in the last ones so that none is alone."""
    if count <= 3:
        return [count]
    last = {0: [3], 1: [2, 2], 2: [2]}[count % 3]
    return [3] * ((count - sum(last)) // 3) + last


def settings_table(runs: Sequence[Run]) -> Table | None:
    """Return how the runs were trained, and what came out, as far as their folders say so; None if none does."""
    names = sorted({name for run in runs for name in run.results}, key=lambda name: (not name.startswith(TESTS), name))
    names = [name for name in names if not name.startswith("train_") and not name.endswith((*NOT_RESULTS, *COUNTS))]
    columns = [
        settings_of(run) | {in_words(name): number(run.results[name]) for name in names if name in run.results}
        for run in runs
    ]
    return _table("Settings and results", columns)


def settings_of(run: Run) -> dict[str, str]:
    """Return how the run was trained, with an empty text for what its folder does not say."""
    with_xsam = any(name.startswith("xsam/") for line in run.history for name in line)
    # The file may be left from an earlier run in the same folder.
    config = run.xsam_config if with_xsam or not run.history else None
    corrected = bool(config.alpha if config else run.points("xsam/rayleigh_quotient"))
    of_two_passes = "X-SAM" if corrected else "SAM"
    in_one_pass = {"eigenvector": "X-SAM, one pass", "random": "one pass, random direction"}
    ours = in_one_pass.get(config.perturbation if config else "", of_two_passes)
    method = ours if config or with_xsam else "stock Trainer" if run.history else ""
    seconds = run.results.get("train_runtime")
    return {
        "Method": method,
        "Correction": config.correction if config and corrected else "",
        "rho": f"{config.rho}{', adaptive' if config.adaptive else ''}" if config else "",
        "alpha": str(config.alpha) if config and corrected else "",
        "Start step": f"{config.start_step:g}" if config and config.start_step else "",
        "Learning rate, highest logged": greatest(run, "learning_rate"),
        "Epochs": greatest(run, "epoch"),
        "Optimizer steps": str(run.steps) if run.history else "",
        "Training time": "" if seconds is None else duration(seconds),
    }


def greatest(run: Run, name: str) -> str:
    """Return the greatest logged number of that name; an empty text if there is none."""
    return f"{max(values):.4g}" if (values := run.points(name).values()) else ""


def last_values(drawn: Sequence[Panel], count: int) -> Table:
    """Return the last value of each curve over steps, for `count` runs."""
    rows: dict[str, list[str]] = {}
    for panel in drawn:
        for curve in panel.curves if panel.x_label == STEP else []:
            rows.setdefault(panel.title, [""] * count)[curve.run] = number(curve.last)
    return Table("Last logged values", rows)


def measured_table(runs: Sequence[Run]) -> Table | None:
    """Return what was measured of the trained models; None if nothing was."""
    figures = [run.sharpness.figures if run.sharpness else {} for run in runs]
    columns = [{name: " ± ".join(map(number, values)) for name, values in column.items()} for column in figures]
    return _table("Measured after training", columns)


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings, by name, under which the runs' sharpness was not measured alike, with each run's value."""
    settings = [run.sharpness.settings for run in runs if run.sharpness]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, "not given") for each in settings] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def in_words(name: str) -> str:
    """Return a logged name as a title: "Evaluation accuracy" for `eval_accuracy`."""
    words = " ".join(WORDS.get(word, word) for word in name.split("_"))
    return words[:1].upper() + words[1:]


def number(value: float) -> str:
    """Return the number with four significant digits."""
    return f"{value:#.4g}".removesuffix(".").replace("-", MINUS)


def duration(seconds: float) -> str:
    """Return the time in hours, minutes and seconds, without what does not matter beside the rest."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def _table(title: str, columns: Sequence[Mapping[str, str]]) -> Table | None:
    """Return the table with each run's cells by row, given in `columns`; None if there are none."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = {name: [column.get(name, "") for column in columns] for name in names}
    rows = {name: cells for name, cells in rows.items() if any(cells)}
    return Table(title, rows) if rows else None
