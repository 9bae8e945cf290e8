"""What tables are made of: records by mode and seed, cells, and the table of a task's runs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from intervals import mean_and_deviation, paired_difference
from modes import ALL_MODES
from records import load
from tasks import TASKS

SEEDS = 5  # of each mode, where it is compared
EIGENVALUE = "top_eigenvalue"
MINUS = "\N{MINUS SIGN}"

Runs = Mapping[str, Mapping[Any, dict[str, Any]]]  # mode -> seed, or (learning rate, seed) of a sweep -> record


def has_all_seeds(runs: Runs, mode: str) -> bool:
    """Return whether the mode has a run of every seed that modes are compared over."""
    return len(runs.get(mode, {})) >= SEEDS


def runs_of(records: Mapping[str, dict[str, Any]], part: str) -> Runs:
    """Return a task's records of "tuned" or "fixed" settings by mode, in the modes' order, and seed.

    Those of a "sweep" are by mode, and learning rate and seed.
    """
    found: dict[str, dict[Any, dict[str, Any]]] = {}
    for mode in ALL_MODES:
        for key, record in records.items():
            if key.startswith(f"{part}/{mode}/"):
                seed = record["seed"]
                run = (record["settings"]["learning_rate"], seed) if part == "sweep" else seed
                found.setdefault(mode, {})[run] = record
    return found


def values(records: Mapping[int, dict[str, Any]], *keys: str) -> dict[int, float]:
    """Return a number by seed, of those runs that have it: one that diverged may not."""
    found = {}
    for seed, record in records.items():
        value: Any = record
        for key in keys:
            value = value[key]
        if value is not None:
            found[seed] = value
    return found


def metric_of(task: str) -> tuple[str, ...]:
    """Return the keys of the task's test metric in a record."""
    return "metrics", "test", TASKS[task].metric


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def spread(numbers: Mapping[int, float]) -> str:
    """Return "mean ± standard deviation", to two digits of the latter where they are not all before the point."""
    if not numbers:
        return "-"
    average, deviation = mean_and_deviation(numbers.values())
    if not deviation > 1e-12 * abs(average):  # a single run, or all alike
        return f"{average:.4g}" + ("" if math.isnan(deviation) else " ± 0")
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{average:.{decimals}f} ± {deviation:.{decimals}f}"


def tuning_table(task: str, records: Mapping[str, dict[str, Any]]) -> str:
    """Return the table of what tuning saw: the mean validation metric by mode, learning rate and rho."""
    metric, rows = TASKS[task].metric, []
    for mode in ALL_MODES:
        seen: dict[tuple[float, float], list[float]] = {}
        for key, record in records.items():
            value = record.get("metrics", {}).get("validation", {}).get(metric)
            if key.startswith(f"tuning/{mode}/") and value is not None:
                settings = record["settings"]
                rho = settings["xsam"]["rho"] if settings["xsam"] else 0.0
                seen.setdefault((settings["learning_rate"], rho), []).append(value)
        cells = [
            f"{rate:g}{f', {rho:g}' if rho else ''}: {mean_and_deviation(seen[rate, rho])[0]:.3f}"
            for rate, rho in sorted(seen)
        ]
        if cells:
            rows.append([f"`{mode}`", "; ".join(cells)])
    return table(["", f"learning rate, rho: validation {metric}"], rows)


def summary(task: str, runs: Runs) -> str:
    """Return the table of a task: every mode's means, and its paired differences to SAM."""
    metric = TASKS[task].metric
    head = ["mode", "n", "learning rate, rho", "steps", f"test {metric}", "top eigenvalue", "loss gap", "CPU s"]
    head += [f"{metric} {MINUS} SAM's", f"eigenvalue {MINUS} SAM's"]
    rows = []
    for mode, records in runs.items():
        some = next(iter(records.values()))
        settings = some["settings"]
        rho = "" if settings["xsam"] is None else f", {settings['xsam']['rho']:g}"
        keys = [metric_of(task), ("metrics", EIGENVALUE), ("metrics", "loss_gap"), ("cost", "train_cpu_seconds")]
        diverged = sum(record["metrics"]["test"]["loss"] is None for record in records.values())
        n = f"{len(records)}, {diverged} diverged" if diverged else f"{len(records)}"
        row = [mode, n, f"{settings['learning_rate']:g}{rho}", str(some["cost"]["steps"])]
        row += [spread(values(records, *key)) for key in keys]
        for key in keys[:2]:
            sam = {} if mode == "sam" else values(runs.get("sam", {}), *key)
            row.append(str(paired_difference(values(records, *key), sam)))
        rows.append(row)
    return table(head, rows)


def cost_rows(results: Path) -> list[list[str]]:
    """Return what a step costs in each mode, by task."""
    rows = []
    for task in TASKS:
        record = load(task, results).get("cost")
        if record:
            for mode, seconds in record["cpu_seconds_per_step"].items():
                relative, passes = (
                    record[name][mode] for name in ("relative_cpu_seconds", "forward_backward_per_step")
                )
                rows.append([task, mode, f"{seconds:.3g}", f"{relative:.2f}", f"{passes:.2f}"])
    return rows
