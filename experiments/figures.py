"""The figures: every run of the first six tasks, and what each mode gains at what price."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
from intervals import mean_and_deviation
from tables import EIGENVALUE, Runs, metric_of, values
from tasks import TASKS

matplotlib.use("Agg")
from matplotlib import pyplot


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
