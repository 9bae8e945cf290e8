"""Training runs as they lie on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import XSAMConfig
from ..saving.checkpoint import TRAINER_STATE_NAME, checkpoints_in
from ..settings_file import CONFIG_NAME
from ..sharpness.measuring import FILE_NAME

RESULTS_NAME = "all_results.json"  # what the recipes, and Transformers' example scripts, write their results to


class RunError(ValueError):
    """A run that cannot be read; the message names the path and the remedy."""


@dataclass(frozen=True)
class Measured:
    """The contents of a `sharpness.json`.

    Attributes:
        figures: numbers by name, each with its standard error if it has one.
        slices: loss by distance, by direction.
        settings: text by name.
    """

    figures: dict[str, list[float]]
    slices: dict[str, dict[float, float]]
    settings: dict[str, str]


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: its name, different from the others' names.
        history: the lines that the Trainer logged, each with its `step`; empty for a model that was only measured.
        sharpness: the measurements of `hf-xsam sharpness`, or None.
        xsam_config: X-SAM's settings, which its trainer saves beside each model; None if there are none.
        results: the numbers that were written after training, by name: of the training, of evaluations, of a test.
    """

    name: str
    history: list[dict[str, Any]]
    sharpness: Measured | None
    xsam_config: XSAMConfig | None
    results: dict[str, float]

    @property
    def steps(self) -> int:
        """Return the last logged step."""
        return int(max((line["step"] for line in self.history), default=0))

    def points(self, name: str) -> dict[float, float]:
        """Return the logged numbers of that name, by step."""
        return {line["step"]: line[name] for line in self.history if is_number(line.get(name))}


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
        places = (folder, file.parent)
        measured, config, saved = (find_beside(places, each) for each in (FILE_NAME, CONFIG_NAME, RESULTS_NAME))
        runs.append(
            Run(
                name,
                history,
                sharpness=read_sharpness(measured) if measured else None,
                xsam_config=XSAMConfig.from_pretrained(config.parent) if config else None,
                results=read_results(history, saved),
            )
        )
    return runs


def find_beside(folders: Sequence[Path], name: str) -> Path | None:
    """Return the file of that name in the first folder that has one; None if none has."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def read_results(history: Sequence[Mapping[str, Any]], saved: Path | None) -> dict[str, float]:
    """Return the numbers of the training and of a test that were logged, and those in the file `saved`, by name."""
    logged = {name: x for line in history for name, x in line.items() if name.startswith(("test_", "train_"))}
    found = logged | (_read_json(saved, "remove the file.") if saved else {})
    return {name: x for name, x in found.items() if is_number(x)}


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


def sharpness_figures(content: Mapping[str, Any]) -> dict[str, list[float]]:
    """Return the figures of a `sharpness.json` as in `Measured`; only loss and eigenvalues have to be there."""
    found: dict[str, list[Any]] = {"Loss": [content["loss"]], "Gradient norm": [content.get("gradient_norm")]}
    found |= {f"Eigenvalue {i}": [value] for i, value in enumerate(content["eigenvalues"], 1)}
    angles = content.get("gradient_angles_degrees", [])
    found |= {f"Angle, gradient to eigenvector {i} (°)": [angle] for i, angle in enumerate(angles, 1)}
    if trace := content.get("trace"):
        found["Trace, ± standard error"] = [trace["mean"], trace.get("standard_error")]
    found |= {f"SAM sharpness, rho {rho}": [value] for rho, value in content.get("sam_sharpness", {}).items()}
    numbers = {name: [float(value) for value in values if value is not None] for name, values in found.items()}
    return {name: values for name, values in numbers.items() if values}


def is_number(value: Any) -> bool:
    """Return whether `value` is an int or a float; `compute_metrics` may return anything."""
    return isinstance(value, int | float) and not isinstance(value, bool)


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
