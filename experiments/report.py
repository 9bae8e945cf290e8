"""Write the tables of `experiments/README.md`, the short one of `README.md`, and the figure, from the results.

    python experiments/report.py

Every verdict follows from a 95% confidence interval of the paired difference over seeds; none is written by hand.
"""

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

from modes import ALL_MODES
from pages import filled
from records import RESULTS, load
from scipy import stats
from tasks import TASKS

matplotlib.use("Agg")
from matplotlib import pyplot

ROOT = Path(__file__).parent.parent
FIGURE = "results.svg"
PARTS = {"tuned": "each mode's own settings", "fixed": "the same settings for all"}
EIGENVALUE = "top_eigenvalue"
MINUS = "\N{MINUS SIGN}"

Runs = Mapping[str, Mapping[int, dict[str, Any]]]  # mode -> seed -> record


class Difference(NamedTuple):
    """The mean over seeds of one mode's value minus another's, and its 95% confidence interval."""

    n: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Return which side of zero the interval lies on."""
        if self.n < 2:
            return "too few seeds"
        return "lower" if self.high < 0 else "higher" if self.low > 0 else "within noise"

    def __str__(self) -> str:
        if self.n == 0:
            return "-"
        return f"{self.mean:+.3g}" + (f" [{self.low:+.3g}, {self.high:+.3g}]" if self.n > 1 else "")


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference:
    """Return the difference between two modes, paired by the seeds that both have.

    mean(d) -+ t(0.975, n - 1) * s(d) / sqrt(n), d the n differences and s their standard deviation.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    differences = [ours[seed] - theirs[seed] for seed in seeds]
    n = len(differences)
    if n < 2:
        return Difference(n, differences[0] if n else math.nan, math.nan, math.nan)
    average, deviation = mean_and_deviation(differences)
    average = round(average, 12)  # a sum of rounding errors is none
    half = float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)
    return Difference(n, average, average - half, average + half)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean, and the standard deviation of the sample (n - 1), nan for a single value."""
    values = list(values)
    average = sum(values) / len(values)
    if len(values) < 2:
        return average, math.nan
    return average, math.sqrt(sum((value - average) ** 2 for value in values) / (len(values) - 1))


def runs_of(records: Mapping[str, dict[str, Any]], part: str) -> Runs:
    """Return a task's records of "tuned" or "fixed" settings by mode, in the modes' order, and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for mode in ALL_MODES:
        for key, record in records.items():
            if key.startswith(f"{part}/{mode}/"):
                found.setdefault(mode, {})[record["seed"]] = record
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
    if not deviation > 0:  # a single run, or all alike
        return f"{average:.4g}" + ("" if math.isnan(deviation) else " ± 0")
    decimals = max(0, 1 - math.floor(math.log10(deviation)))
    return f"{average:.{decimals}f} ± {deviation:.{decimals}f}"


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


class Claim(NamedTuple):
    """A statement that one mode's value differs from another's.

    Attributes:
        text: the statement.
        pairs: the two modes, ours first.
        eigenvalue: whether it is of the top eigenvalue; of the test metric if not.
    """

    text: str
    pairs: Sequence[tuple[str, str]]
    eigenvalue: bool


ALIGNED = ("aligned_0.5", "aligned_1", "aligned_2")
PAPER = ("paper", "paper_norm_kept")
CORRECTED = (*PAPER, "projection", *ALIGNED)
CLAIMS = [
    Claim(
        "X-SAM as in the paper lowers the top eigenvalue against SAM, at equal steps",
        [(mode, "sam") for mode in PAPER],
        True,
    ),
    Claim("X-SAM improves the test metric against SAM, at equal steps", [(mode, "sam") for mode in CORRECTED], False),
    Claim(
        "`aligned` lowers the top eigenvalue more than the paper's correction",
        [(mode, other) for mode in ALIGNED for other in PAPER],
        True,
    ),
    Claim(
        "X-SAM improves the test metric at equal cost, against the longer runs of SAM and the stock optimizer",
        [(mode, other) for mode in CORRECTED for other in ("sam_long", "stock_long")],
        False,
    ),
]


def claim_rows(claim: Claim, found: Mapping[tuple[str, str], Runs]) -> list[list[str]]:
    """Return a row for each task, settings and pair of modes that there are runs of."""
    rows = []
    for (task, part), runs in found.items():
        keys = ("metrics", EIGENVALUE) if claim.eigenvalue else metric_of(task)
        better = "lower" if claim.eigenvalue or not TASKS[task].greater_is_better else "higher"
        for ours, theirs in claim.pairs:
            if ours in runs and theirs in runs:
                difference = paired_difference(values(runs[ours], *keys), values(runs[theirs], *keys))
                verdict = difference.verdict
                holds = "yes" if verdict == better else "the opposite" if verdict in ("lower", "higher") else "open"
                label = f"{ours} {MINUS} {theirs}"
                rows.append([task, part, label, keys[-1], str(difference), str(difference.n), verdict, holds])
    return rows


TITLES = {
    "digits_cnn": "CNN, 10% wrong labels",
    "digits_vit": "small ViT",
    "movies_500": "MiniLM, 500 sentences",
    "movies_noise": "MiniLM, 800, 20% wrong labels",
    "movies": "MiniLM, 2,500",
    "movie_text_lora": "SmolLM2, LoRA: perplexity",
}
LABELS = {
    "stock": "stock Trainer",
    "sam": "SAM",
    "paper": "X-SAM, `paper`",
    "projection": "`projection`",
    "aligned_0.5": "`aligned`, alpha 0.5",
    "aligned_1": "`aligned`, alpha 1",
    "aligned_2": "`aligned`, alpha 2",
    "stock_long": "stock Trainer, in X-SAM's time",
    "sam_long": "SAM, in X-SAM's time",
}


FIRST_PAGE = ("stock", "sam", "paper", "stock_long", "sam_long")  # the rows of README.md's table


def complete(found: Mapping[tuple[str, str], Runs]) -> dict[str, Runs]:
    """Return the tuned runs of the tasks that have five seeds of every mode."""
    return {
        task: runs
        for (task, part), runs in found.items()
        if part == "tuned" and all(mode in runs and len(runs[mode]) >= 5 for mode in LABELS)
    }


def overview(found: Mapping[tuple[str, str], Runs]) -> str:
    """Return the table of test metric and top eigenvalue of every mode."""
    tasks = complete(found)

    def cell(task: str, records: Mapping[int, dict[str, Any]]) -> str:
        return ", ".join(spread(values(records, *keys)) for keys in (metric_of(task), ("metrics", EIGENVALUE)))

    rows = [[label, *(cell(task, runs[mode]) for task, runs in tasks.items())] for mode, label in LABELS.items()]
    return table(["", *(TITLES[task] for task in tasks)], rows)


def short(found: Mapping[tuple[str, str], Runs]) -> str:
    """Return the table of README.md: the mean test metric of a few modes, to three digits."""
    tasks = complete(found)

    def cell(task: str, records: Mapping[int, dict[str, Any]]) -> str:
        average, _ = mean_and_deviation(values(records, *metric_of(task)).values())
        return f"{average:#.3g}".removesuffix(".")

    rows = [[LABELS[mode], *(cell(task, runs[mode]) for task, runs in tasks.items())] for mode in FIRST_PAGE]
    return table(["", *(TITLES[task] for task in tasks)], rows)


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


def load_all(results: Path) -> dict[tuple[str, str], Runs]:
    """Return the records of every task and settings that have any."""
    records = {task: load(task, results) for task in TASKS}
    return {(task, part): runs for task in TASKS for part in PARTS if (runs := runs_of(records[task], part))}


def report(found: Mapping[tuple[str, str], Runs], results: Path) -> str:
    """Return all tables, with a link to the figure."""
    if not found:
        return "There are no results yet."
    parts = ["### The claims"]
    head = ["task", "settings", "difference", "of", "mean [95% interval]", "n", "verdict", "claim holds"]
    for number, claim in enumerate(CLAIMS, 1):
        rows = claim_rows(claim, found)
        parts += [f"{number}. {claim.text}:", table(head, rows) if rows else "No runs of these modes yet."]
    parts.append(f"![Test metric and top eigenvalue of every run]({FIGURE})")
    for (task, part), runs in found.items():
        parts += [f"### {task}, {PARTS[part]}", summary(task, runs)]
    if rows := cost_rows(results):
        head = ["task", "mode", "CPU s a step", "relative", "forward and backward passes a step"]
        parts += ["### Cost of a step", table(head, rows)]
    return "\n\n".join(parts)


def pages(found: Mapping[tuple[str, str], Runs], results: Path, root: Path) -> dict[Path, str]:
    """Return the pages under `root` that have tables of the results, with these made anew."""
    all_tables, first_page = root / "experiments" / "README.md", root / "README.md"
    tables = {"results": report(found, results), "overview": overview(found)}
    return {
        all_tables: filled(all_tables, {name: f"\n{text}\n" for name, text in tables.items()}),
        first_page: filled(first_page, {"experiments": f"\n{short(found)}\n"}),
    }


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (%(default)s)")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the two pages (%(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Read the results, write both pages and the figure."""
    options = parse(argv)
    found = load_all(options.results)
    for page, text in pages(found, options.results, options.root).items():
        page.write_text(text, encoding="utf-8")
        print(f"Wrote {page}.")
    if found:
        draw(found, options.root / "experiments" / FIGURE)


if __name__ == "__main__":
    main()
