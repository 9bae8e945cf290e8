"""Which runs there are, in which order, with which settings."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from cost import CostJob, long_epochs
from modes import ALL_MODES, LONG, MODES
from records import file_of, load
from tasks import TASKS, Task
from training import Job


def default_modes(task: Task) -> list[str]:
    """Return the modes run when none is named, in their order.

    Adam divides the gradient's scale out, so "paper" is enough there.
    """
    left_out = () if task.arguments.get("optim") == "sgd" else ("paper_norm_kept",)
    return [mode for mode in ALL_MODES if mode in task.modes and mode not in left_out]


def radius(rho: float, mode: str) -> float | None:
    """Return a mode's radius where SAM's is `rho`; None for the stock optimizer, which has none."""
    kind = MODES[mode]
    return None if kind.xsam is None else float(f"{rho * kind.rho_factor:g}")


Axes = tuple[list[float], list[float | None]]  # learning rates, and rhos


def axes(task: Task, mode: str) -> Axes:
    """Return the learning rates and the rhos whose products are tried for a mode; as many points for each mode."""
    if mode == "stock":
        return list(task.stock_learning_rates), [None]
    starts_late = "start_step" in (MODES[mode].xsam or {})
    rates = (starts_late and task.late_learning_rates) or task.learning_rates
    return list(rates), [radius(rho, mode) for rho in task.rhos]


def widened(axis: list[Any], best: float | None) -> list[Any]:
    """Return the axis with one more value beyond `best` where that is at an end, its half or its double."""
    if best is None:  # the stock optimizer's rho
        return axis
    return axis + [float(f"{factor * best:g}") for end, factor in ((min, 0.5), (max, 2.0)) if end(axis) == best]


def grid_jobs(
    name: str, part: str, grids: Mapping[str, Axes], seeds: Iterable[int], epochs: float | None = None
) -> list[Job]:
    """Return a run of each point of each mode's grid, all modes of a point before the next point, seed by seed."""
    epochs = TASKS[name].arguments["num_train_epochs"] if epochs is None else epochs
    turns = [*zip_longest(*([(mode, *point) for point in product(*grid)] for mode, grid in grids.items()))]
    return [
        Job(name, part, mode, seed, rate, rho, epochs)
        for seed in seeds
        for turn in turns
        for mode, rate, rho in filter(None, turn)
    ]


def tuning_jobs(name: str, modes: Iterable[str], results: Path, epochs: float | None = None) -> list[Job]:
    """Return the runs that the settings of `modes` are chosen by; a "_long" mode takes those of the mode it extends.

    They are those of the grid and, where its best point is at an end, of the grid widened there, at most as often as
    the task says: so what there are depends on the results so far.
    """
    tuned = [mode for mode in MODES if mode in {mode.removesuffix(LONG) for mode in modes}]
    task = TASKS[name]
    grids = {mode: axes(task, mode) for mode in tuned}
    for _ in range(task.widenings):
        for mode, (rates, rhos) in grids.items():
            tried = grid_jobs(name, "tuning", {mode: (rates, rhos)}, task.tuning_seeds, epochs)
            if best := chosen_settings(tried, results):
                grids[mode] = widened(rates, best[0]), widened(rhos, best[1])
    return grid_jobs(name, "tuning", grids, task.tuning_seeds, epochs)


def chosen_settings(jobs: Sequence[Job], results: Path) -> tuple[float, float | None] | None:
    """Return learning rate and rho of a mode's best runs: best mean metric on the validation split, then mean loss.

    Args:
        jobs: all tuning runs of one mode.
        results: the folder that holds their results.

    Returns:
        None while results are missing.
    """
    scores: dict[tuple[float, float | None], list[tuple[float, float]]] = {}
    task, records = TASKS[jobs[0].task], load(jobs[0].task, results)
    for job in jobs:
        if job.key not in records:
            return None
        validation = records[job.key]["metrics"]["validation"]
        value, loss = (math.nan if x is None else x for x in (validation[task.metric], validation["loss"]))
        score = (value if task.greater_is_better else -value, -loss)
        # A run that diverged counts as the worst.
        score = tuple(-math.inf if math.isnan(x) else x for x in score)
        scores.setdefault((job.learning_rate, job.rho), []).append(score)
    return max(scores, key=lambda point: tuple(sum(x) / len(x) for x in zip(*scores[point], strict=True)))


def reporting_jobs(
    name: str, part: str, modes: Sequence[str], seeds: Iterable[int], results: Path, epochs: float | None = None
) -> tuple[list[Job], list[str]]:
    """Return the runs that are reported, all modes of a seed before the next seed.

    Args:
        name: the task's.
        part: "fixed", "tuned" or "sweep".
        modes, seeds: to run.
        results: folder with the results of tuning and the costs of a step.
        epochs: instead of the task's.

    Returns:
        The runs, and the modes that wait for a result of tuning, or for the cost of a step, that there is not.
    """
    if part == "sweep":
        return grid_jobs(name, part, {mode: axes(TASKS[name], mode) for mode in modes}, seeds, epochs), []
    task = TASKS[name]
    epochs = task.arguments["num_train_epochs"] if epochs is None else epochs
    cost = load(name, results).get(CostJob(name).key)
    found: dict[str, tuple[float, float | None, float]] = {}
    for mode in modes:
        base = mode.removesuffix(LONG)
        point: tuple[float, float | None] | None = (task.learning_rate, radius(task.rho, base))
        if part == "tuned":
            point = chosen_settings(tuning_jobs(name, [base], results, epochs), results)
        if point is not None and (mode == base or cost):
            length = epochs if mode == base else long_epochs(epochs, mode, cost)
            found[mode] = (*point, length)
    jobs = [Job(name, part, mode, seed, *found[mode]) for seed in seeds for mode in modes if mode in found]
    return jobs, [mode for mode in modes if mode not in found]


def is_done(job: Job | CostJob, results: Path) -> bool:
    """Return whether there is a result of the job.

    Raises:
        ValueError: for a result of the same run under other settings.
    """
    record = load(job.task, results).get(job.key)
    if record is None:
        return False
    settings, found = json.loads(json.dumps(job.settings())), record["settings"]
    if settings != found:
        changed = sorted(name for name in settings.keys() | found.keys() if settings.get(name) != found.get(name))
        raise ValueError(
            f"{file_of(job.task, results)} has {job.key} with other settings ({', '.join(changed)}). Delete that line "
            "to run it again, with all that it is compared with, or name another folder with --results."
        )
    return True
