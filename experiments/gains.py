"""The tables of the tasks with wrong labels: what each mode gains over the stock optimizer, and at what price.

In each table a column of p-values is one family of comparisons, to which Holm's correction is applied.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

from intervals import holm, mean_and_deviation, paired_difference
from modes import LABELS
from tables import EIGENVALUE, MINUS, Runs, has_all_seeds, metric_of, spread, table, values

Record = Mapping[str, Any]
Values = Mapping[int, float]  # by seed
KINDS = ("int4", "int3", "noise_0.1", "noise_0.2")
CLEAN, WRONG = "validation", "wrong_validation"  # what a run is stopped early on


def best_epoch(record: Record, split: str) -> int:
    """Return the epoch, from 0, with the best accuracy on `split`, the first one of several."""
    accuracies = record["metrics"]["epochs"][split]["accuracy"]
    return max(range(len(accuracies)), key=lambda epoch: accuracies[epoch])


def stopped_early(records: Mapping[int, Record], split: str, score: str = "accuracy") -> dict[int, float]:
    """Return a test score of each seed's model of the epoch that was best on `split`."""
    found = {}
    for seed, record in records.items():
        value = record["metrics"]["epochs"]["test"][score][best_epoch(record, split)]
        if value is not None:
            found[seed] = value
    return found


def price(runs: Runs, mode: str) -> float:
    """Return the CPU time of a mode's training relative to the stock optimizer's: a mean over the seeds of both."""
    seconds, stock = (values(runs[name], "cost", "train_cpu_seconds") for name in (mode, "stock"))
    ratios = [seconds[seed] / stock[seed] for seed in seconds.keys() & stock.keys()]
    return mean_and_deviation(ratios)[0] if ratios else math.nan


class Row(NamedTuple):
    """A row of a table: a mode, and a number by seed."""

    label: str
    time: float
    numbers: Values


def rows_of(runs: Runs, read: Callable[[Mapping[int, Record]], Values]) -> list[Row]:
    """Return a row of each mode, its numbers by `read`."""
    return [Row(f"`{mode}`", price(runs, mode), read(records)) for mode, records in runs.items()]


def at_last_epoch(task: str, runs: Runs) -> list[Row]:
    """Return the rows of the test metric after the last epoch, and of the stock optimizer stopped early."""
    rows = rows_of(runs, lambda records: values(records, *metric_of(task)))
    stock = runs.get("stock", {})
    stopped = [
        Row(f"`stock`, stopped on {kind} validation labels", 1.0, stopped_early(stock, split))
        for split, kind in ((CLEAN, "clean"), (WRONG, "wrong"))
    ]
    return rows[:1] + stopped + rows[1:] if stock else rows


def compared(rows: Sequence[Row], others: Iterable[Values]) -> list[list[str]]:
    """Return two cells for each row: its difference to the other numbers, and Holm's p over all of the rows.

    A row is not compared with its own numbers.
    """
    differences = [
        paired_difference(row.numbers, other if row.numbers != other else {})
        for row, other in zip(rows, others, strict=True)
    ]
    return [
        [str(difference), "-" if math.isnan(p) else f"{p:.2g}"]
        for difference, p in zip(differences, holm([difference.p for difference in differences]), strict=True)
    ]


def times(row: Row) -> str:
    """Return the cell of a row's price."""
    return "-" if math.isnan(row.time) else f"{row.time:.2f}"


def against(head: str, rows: Sequence[Row], references: Mapping[str, Values]) -> str:
    """Return a table of the rows' numbers and their differences to each of the references."""
    columns = [compared(rows, [numbers] * len(rows)) for numbers in references.values()]
    titles = [title for name in references for title in (f"{MINUS} {name} [95%]", "p (Holm)")]
    lines = [
        [row.label, str(len(row.numbers)), times(row), spread(row.numbers), *chain(*cells)]
        for row, *cells in zip(rows, *columns, strict=True)
    ]
    return table(["", "n", "time", head, *titles], lines)


def last_epoch_table(task: str, runs: Runs) -> str:
    """Return the table of the test metric after the last epoch."""
    stock = runs.get("stock", {})
    references = {
        "`stock`": values(stock, *metric_of(task)),
        "`stock` stopped on wrong": stopped_early(stock, WRONG),
        "`stock` stopped on clean": stopped_early(stock, CLEAN),
    }
    return against(f"test {metric_of(task)[-1]}", at_last_epoch(task, runs), references)


def stopped_table(task: str, runs: Runs, split: str) -> str:
    """Return the table of the test metric of each run's best epoch on `split`."""
    rows = rows_of(runs, partial(stopped_early, split=split))
    return against(f"test {metric_of(task)[-1]}", rows, {"`stock`": stopped_early(runs.get("stock", {}), split)})


def score_table(runs: Runs, head: str, *keys: str) -> str:
    """Return the table of another number of the final model."""
    rows = rows_of(runs, lambda records: values(records, *keys))
    return against(head, rows, {"`stock`": values(runs.get("stock", {}), *keys)})


def loss_of_accuracy(records: Mapping[int, Record], kind: str) -> dict[int, float]:
    """Return by how much a kind of damage changes the test accuracy, by seed."""
    after, before = (values(records, "metrics", *keys, "accuracy") for keys in (("damage", kind), ("test",)))
    return {seed: after[seed] - before[seed] for seed in after.keys() & before.keys()}


def damage_table(runs: Runs) -> str:
    """Return the table of test loss and accuracy before and after damage."""

    def cell(records: Mapping[int, Record], *keys: str) -> str:
        return ", ".join(spread(values(records, "metrics", *keys, score)) for score in ("loss", "accuracy"))

    lines = [
        [f"`{mode}`", cell(records, "test"), *(cell(records, "damage", kind) for kind in KINDS)]
        for mode, records in runs.items()
    ]
    return table(["", "before", *KINDS], lines)


def robustness_table(runs: Runs, kind: str) -> str:
    """Return the table of what a kind of damage changes in the test accuracy."""
    read = partial(loss_of_accuracy, kind=kind)
    return against("change", rows_of(runs, read), {"`stock`'s": read(runs.get("stock", {}))})


# Which part does the top eigenvector play, which the perturbation, which the late start, which the longer training?
PAIRS = (
    *(("sam", "stock_long"), ("one_pass", "stock_long"), ("one_pass", "sam"), ("one_pass", "one_pass_random")),
    *(("one_pass_differences", other) for other in ("stock_long", "sam", "one_pass")),
    *(("one_pass_random", other) for other in ("stock_long", "sam", "one_pass_differences")),
    *(("paper", "sam"), ("paper", "paper_random"), ("paper", "sam_long"), ("paper", "stock_long")),
    *(("projection", "sam"), ("projection", "projection_random"), ("aligned_0.5", "sam")),
    *((f"sam_late_{start}", "sam") for start in (0.5, 0.7, 0.9)),
    *((f"one_pass_late_{start}", "one_pass") for start in (0.5, 0.7, 0.9)),
)


def pairs_table(task: str, runs: Runs) -> str:
    """Return the table of the pairs that there are runs of, after the last epoch."""
    pairs = [pair for pair in PAIRS if all(mode in runs for mode in pair)]
    rows = [
        Row(f"`{ours}` {MINUS} `{theirs}`", price(runs, ours), values(runs[ours], *metric_of(task)))
        for ours, theirs in pairs
    ]
    cells = compared(rows, [values(runs[theirs], *metric_of(task)) for _, theirs in pairs])
    lines = [
        [row.label, f"{times(row)}, {price(runs, theirs):.2f}", *both]
        for row, (_, theirs), both in zip(rows, pairs, cells, strict=True)
    ]
    return table(["", "times", f"difference of test {metric_of(task)[-1]} [95%]", "p (Holm)"], lines)


def chosen(runs: Runs) -> str:
    """Return what tuning chose: learning rate and rho of each mode."""
    parts = []
    for mode, records in runs.items():
        settings = next(iter(records.values()))["settings"]
        rho = "" if settings["xsam"] is None else f", {settings['xsam']['rho']:g}"
        parts.append(f"`{mode}` {settings['learning_rate']:g}{rho}")
    return "Learning rate and rho that tuning chose: " + "; ".join(parts) + "."


def gains(task: str, runs: Runs) -> str:
    """Return all tables of a task with wrong labels."""
    sections = {
        "After the last epoch": last_epoch_table(task, runs),
        "Each run's best epoch on clean validation labels": stopped_table(task, runs, CLEAN),
        "Each run's best epoch on wrong validation labels": stopped_table(task, runs, WRONG),
        "Mode against mode, after the last epoch": pairs_table(task, runs),
        "Negative log-likelihood of the final model, test": score_table(runs, "NLL", "metrics", "test", "loss"),
        "Calibration error of the final model, test": score_table(runs, "ECE", "metrics", "test", "ece"),
        "Top eigenvalue of the training loss": score_table(runs, "eigenvalue", "metrics", EIGENVALUE),
        "Test loss and accuracy of the final model under damage": damage_table(runs),
        **{f"Change of the test accuracy by {kind}": robustness_table(runs, kind) for kind in ("int3", "noise_0.2")},
    }
    if any("elsewhere" in record["metrics"] for records in runs.values() for record in records.values()):
        sections["Accuracy on reviews of products"] = score_table(runs, "accuracy", "metrics", "elsewhere", "accuracy")
    return "\n\n".join([chosen(runs), *(f"*{name}*\n\n{text}" for name, text in sections.items())])


SHORT_TITLES = {
    "digits_cnn_wrong40": "CNN, 40% wrong",
    "digits_cnn_wrong60": "CNN, 60% wrong",
    "digits_vit_wrong40": "small ViT, 40% wrong",
    "movies_memorized": "MiniLM, 30% wrong",
}


def short_gains(found: Mapping[str, Runs]) -> str:
    """Return the table of README.md: mean test accuracy, then price, of a few modes; "-" without five seeds.

    Returns:
        "" where no task has five seeds of the stock optimizer.
    """
    complete = {task: runs for task, runs in found.items() if has_all_seeds(runs, "stock")}
    rows = {label: [] for label in LABELS.values()}
    stopped = {
        split: f"stock Trainer, best epoch on {kind} validation labels"
        for split, kind in ((WRONG, "wrong"), (CLEAN, "clean"))
    }
    rows |= {label: [] for label in stopped.values()}
    for task, runs in complete.items():
        for mode, label in LABELS.items():
            cell = "-"
            if has_all_seeds(runs, mode):
                average, _ = mean_and_deviation(values(runs[mode], *metric_of(task)).values())
                cell = f"{average:.3f}, {price(runs, mode):.1f}x"
            rows[label].append(cell)
        for split, label in stopped.items():
            average, _ = mean_and_deviation(stopped_early(runs["stock"], split).values())
            rows[label].append(f"{average:.3f}, 1.0x")
    titles = [SHORT_TITLES[task] for task in complete]
    return table(["", *titles], [[label, *cells] for label, cells in rows.items()]) if complete else ""
