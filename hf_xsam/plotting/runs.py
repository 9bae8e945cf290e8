"""Training runs as they lie on disk."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..saving.checkpoint import TRAINER_STATE_NAME, checkpoints_in
from ..sharpness.measuring import FILE_NAME


class RunError(ValueError):
    """A run that cannot be read; the message names the path and the remedy."""


@dataclass(frozen=True)
class Measured:
    """What a `sharpness.json` says.

    Attributes:
        figures: numbers by name, each with its standard error where it has one.
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
        name: what tells it from the others drawn with it.
        history: the lines that the Trainer logged, each with its `step`; none of a model that was measured only.
        sharpness: what `hf-xsam sharpness` measured, or None.
    """

    name: str
    history: list[dict[str, Any]]
    sharpness: Measured | None

    @property
    def steps(self) -> int:
        """Return the last step that something was logged at."""
        return int(max((line["step"] for line in self.history), default=0))


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Read each of `paths` once, and name the runs by the shortest ends of their paths that tell them apart.

    Raises:
        RunError: for a path that holds no run, or a file in it that is damaged.
    """
    # Each file once, with the folder of its run: a folder and the trainer_state.json in it are one run.
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
    """Return what there is of a run at `path`.

    It is the file itself, the Trainer's state in the folder or in its newest checkpoint, or, of a model that no Trainer
    has trained here, the folder's `sharpness.json`.
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
    """Return the last part of each path, or as many of the last parts as it takes for all to differ."""
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def read_history(path: Path) -> list[dict[str, Any]]:
    """Return the lines that a Trainer's state has of its logs."""
    remedy = "plot a checkpoint of the run instead, or train it again."
    history = _read_json(path, remedy).get("log_history")
    if not isinstance(history, list) or not all(isinstance(x, dict) and is_number(x.get("step")) for x in history):
        raise RunError(f"{path} is not the state of a Trainer: it has no log_history of steps; {remedy}")
    return history


def read_sharpness(path: Path) -> Measured:
    """Return what `hf-xsam sharpness` has written into the file; only loss and eigenvalues have to be in it."""
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
        raise RunError(f"{path} is not as hf-xsam sharpness writes it ({error!r}); {remedy}") from error


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
    """Return whether `value` is an int or a float; what `compute_metrics` returns may be anything."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); {remedy}") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged, it does not hold JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise RunError(f"{path} holds a JSON {type(content).__name__}, not an object; {remedy}")
    return content
