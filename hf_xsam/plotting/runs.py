"""Read training runs from disk, and make the panels of curves and the tables that are drawn."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..saving.checkpoint import TRAINER_STATE_NAME, checkpoints_in
from ..sharpness.measuring import FILE_NAME
from ..step.logs import NOT_RESULTS

MEASURED = "measured"
ESTIMATED = "X-SAM's estimate"
STEP = "optimizer step"
DISTANCE = "distance from the final weights"
MINUS = "\N{MINUS SIGN}"


class RunError(ValueError):
    """A run that cannot be read; the message names the path and the remedy."""


@dataclass(frozen=True)
class Measured:
    """The contents of a `sharpness.json`.

    Attributes:
        figures: text by name.
        slices: loss by distance, by direction.
        settings: text by name.
    """

    figures: dict[str, str]
    slices: dict[str, dict[float, float]]
    settings: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its name, different from the others' names.
        history: the lines that the Trainer logged, each with its `step`; empty for a model that was only measured.
        sharpness: the measurements of `hf-xsam sharpness`, or None.
    """

    name: str
    history: list[dict[str, Any]]
    sharpness: Measured | None

    @property
    def steps(self) -> int:
        """Return the last logged step."""
        return int(max((line["step"] for line in self.history), default=0))


@dataclass(frozen=True)
class Curve:
    """One line of a panel: the run's number, y by x, and the kind of its values if the panel has two."""

    run: int
    points: dict[float, float]
    kind: str = ""

    @property
    def last(self) -> float:
        """Return the value at the largest x."""
        return self.points[max(self.points)]


@dataclass(frozen=True)
class Panel:
    """Curves in the same axes; with `log`, the y-axis is logarithmic."""

    title: str
    x_label: str
    curves: list[Curve]
    log: bool = False


@dataclass(frozen=True)
class Table:
    """Rows with a name and a cell for each run; the cell is empty if the run has no value."""

    title: str
    rows: dict[str, list[str]]


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read each of `paths` once, and name each run by the shortest end of its path that is unique.

    Raises:
        RunError: for a path without a run, or with a damaged file.
    """
    # Each file once, with its run's folder: a folder and the trainer_state.json in it are the same run.
    files: dict[Path, tuple[Path, Path]] = {}
    for path in map(Path, paths):
        file = find_file(path)
        files.setdefault(file.resolve(), (file, file.parent if path.is_file() else path))
    names = distinct_names([folder.resolve() for _, folder in files.values()])
    runs = []
    for (file, folder), name in zip(files.values(), names, strict=True):
        history = [] if file.name == FILE_NAME else read_history(file)
        measured = [path for path in (folder / FILE_NAME, file.parent / FILE_NAME) if path.exists()]
        runs.append(Run(name, history, read_sharpness(measured[0]) if measured else None))
    return runs


def find_file(path: Path) -> Path:
    """Return the file of the run at `path`.

    This is `path` itself if it is a file, the Trainer's state in the folder or its newest checkpoint, or, for a model
    without a training run, the folder's `sharpness.json`.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise RunError(f"There is no run at {path}; give the output_dir of a Trainer, or its {TRAINER_STATE_NAME}.")
    states = [folder / TRAINER_STATE_NAME for folder in (path, *checkpoints_in(path))]
    for file in (*states, path / FILE_NAME):
        if file.exists():
            return file
    raise RunError(
        f"Neither {path} nor a checkpoint in it holds a {TRAINER_STATE_NAME}; give the output_dir of a Trainer that "
        "has saved a checkpoint, or call trainer.save_state() at the end of training. For a model alone, measure it "
        "with hf-xsam sharpness."
    )


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or as many of the last parts as are needed to make all unique."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the logged lines in a Trainer's state."""
    remedy = "plot a checkpoint of the run instead, or train it again."
    history = _read_json(path, remedy).get("log_history")
    if not isinstance(history, list) or not all(isinstance(x, dict) and is_number(x.get("step")) for x in history):
        raise RunError(f"{path} is not the state of a Trainer, because it has no log_history of steps; {remedy}")
    return history


def read_sharpness(path: Path) -> Measured:
    """Read a file that `hf-xsam sharpness` wrote; only the loss and the eigenvalues are required."""
    remedy = "measure the model again with hf-xsam sharpness, or remove the file."
    content = _read_json(path, remedy)
    try:
        return Measured(
            figures=sharpness_figures(content),
            slices={
                direction: {float(x): float(y) for x, y in zip(part["distances"], part["losses"], strict=True)}
                for direction, part in content.get("slices", {}).items()
            },
            settings={name: str(value) for name, value in content.get("settings", {}).items()},
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path} was not written by hf-xsam sharpness ({error!r}); {remedy}") from error


def panels(runs: Sequence[Run]) -> list[Panel]:
    """Return the panels for which some run has data: first those over steps, then the slices of the final loss."""
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
    """Return whether a logarithmic axis fits: all values are above 0, and the highest is over 10 times the lowest."""
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
    """Return the measurements of the trained models; None if there are none."""
    figures = [run.sharpness.figures if run.sharpness else {} for run in runs]
    names = dict.fromkeys(name for column in figures for name in column)
    rows = {name: [column.get(name, "") for column in figures] for name in names}
    return Table("Measured after training", rows) if rows else None


def differing_settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Return the settings that differ between the measurements of the runs, by name, with each run's value."""
    settings = [run.sharpness.settings for run in runs if run.sharpness]
    names = dict.fromkeys(name for each in settings for name in each)
    values = {name: [each.get(name, "not given") for each in settings] for name in names}
    return {name: each for name, each in values.items() if len(set(each)) > 1}


def sharpness_figures(content: Mapping[str, Any]) -> dict[str, str]:
    """Return the figures of a `sharpness.json` as text, by name; only the loss and the eigenvalues are required."""
    eigenvalues, angles = content["eigenvalues"], content.get("gradient_angles_degrees", [])
    figures = {"Loss": content["loss"], "Gradient norm": content.get("gradient_norm")}
    figures |= {f"Eigenvalue {i}": value for i, value in enumerate(eigenvalues, 1)}
    figures |= {f"Angle, gradient to eigenvector {i} (°)": angle for i, angle in enumerate(angles, 1)}
    texts = {name: number(value) for name, value in figures.items() if value is not None}
    if trace := content.get("trace"):
        error = trace.get("standard_error")
        texts["Trace, ± standard error"] = number(trace["mean"]) + ("" if error is None else f" ± {number(error)}")
    sharpness = content.get("sam_sharpness", {})
    return texts | {f"SAM sharpness, rho {rho}": number(value) for rho, value in sharpness.items()}


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float; `compute_metrics` may return anything."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def number(value: float) -> str:
    """Return the number with four significant digits."""
    return f"{value:#.4g}".removesuffix(".").replace("-", MINUS)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a JSON {type(content).__name__}, not an object; {remedy}")
    return content
