"""The figures: every run of the first six tasks, and what each mode gains at what price."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from gains import price
from intervals import mean_and_deviation, paired_difference
from modes import LONG, MODES
from tables import EIGENVALUE, Runs, metric_of, values
from tasks import TASKS

matplotlib.use("Agg")
from matplotlib import pyplot

FAMILIES = {"stock": "tab:gray", "sam": "tab:blue", "one_pass": "tab:green", "paper": "tab:red"}  # others are orange


def draw(found: Mapping[tuple[str, str], Runs], path: Path) -> None:
    """Draw test metric and top eigenvalue of every run, a column a task, a mode a place, the mean as a line."""
    pyplot.rcParams["svg.hashsalt"] = "hf_xsam"  # so that the same results give the same file
    figure, axes = pyplot.subplots(2, len(found), figsize=(3.6 * len(found), 6), squeeze=False, layout="constrained")
    for column, ((task, part), runs) in enumerate(found.items()):
        rows = [(metric_of(task), f"test {TASKS[task].metric}"), (("metrics", EIGENVALUE), "top eigenvalue")]
        for axis, (keys, label) in zip(axes[:, column], rows, strict=True):
            for place, records in enumerate(runs.values()):
                numbers = list(values(records, *keys).values())
                axis.plot([place] * len(numbers), numbers, "o", color="tab:blue", alpha=0.5, markersize=4)
                if numbers:
                    axis.plot(place, mean_and_deviation(numbers)[0], "_", color="black", markersize=14)
            axis.set_xticks(range(len(runs)), list(runs), rotation=90, fontsize=8)
            axis.set_ylabel(label)
        axes[1, column].set_yscale("log", nonpositive="clip")
        axes[0, column].set_title(f"{task}, {part}")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def draw_gains(found: Mapping[str, Runs], path: Path) -> None:
    """Draw the gain of every mode over the stock optimizer, with its interval, against its price; a panel a task.

    The controls, with a random direction in place of v, are left out.
    """
    pyplot.rcParams["svg.hashsalt"] = "hf_xsam"
    figure, axes = pyplot.subplots(1, len(found), figsize=(5 * len(found), 4.5), squeeze=False, layout="constrained")
    for axis, (task, runs) in zip(axes[0], found.items(), strict=True):
        stock = values(runs["stock"], *metric_of(task))
        for mode, records in runs.items():
            if mode == "stock" or MODES[mode.removesuffix(LONG)].random:
                continue
            difference = paired_difference(values(records, *metric_of(task)), stock)
            color = next((FAMILIES[name] for name in FAMILIES if mode.startswith(name)), "tab:orange")
            span = [[difference.mean - difference.low], [difference.high - difference.mean]]
            axis.errorbar(price(runs, mode), difference.mean, span, fmt="o", color=color, markersize=4, alpha=0.7)
            place = price(runs, mode), difference.mean
            axis.annotate(mode, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("training time relative to the stock Trainer")
        axis.set_ylabel(f"test {TASKS[task].metric}, gain over the stock Trainer")
        axis.set_title(task)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
